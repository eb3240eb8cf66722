"""The chat template of an output: a Jinja text, one of well-known forms, or the most frequent one of the models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from ..checkpoint import Checkpoint, read_json
from ..errors import CheckpointError, ConfigError
from ..files import read_regular, write_json, write_text
from ..recipe_forms import MERGEKIT_RUNS_IT
from ..text import shortened

FILE, CONFIG = "chat_template.jinja", "tokenizer_config.json"
_MOST_BYTES = 1 << 20

# The forms of messages that these formats document, written for this project.
TEMPLATES = {
    "chatml": (
        "{% for message in messages %}"
        "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "llama3": (
        "{{ bos_token }}{% for message in messages %}"
        "<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n{{ message['content'] | trim }}<|eot_id|>"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
    "alpaca": (
        "{% for message in messages %}"
        "{% if message['role'] == 'system' %}{{ message['content'] }}\n\n"
        "{% elif message['role'] == 'user' %}### Instruction:\n{{ message['content'] }}\n\n"
        "{% else %}### Response:\n{{ message['content'] }}{{ eos_token }}\n\n{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}### Response:\n{% endif %}"
    ),
}


def check_chat_template(template: str | None) -> None:
    """Refuse a name that stands for no template.

    Raises:
        ConfigError: neither ``auto``, a known name, nor the text of a template.
    """
    if template is None or template == "auto" or template in TEMPLATES or "{" in template:
        return
    raise ConfigError(
        f"chat_template: expected auto, {', '.join(TEMPLATES)} or the text of a Jinja template, got "
        f"{shortened(template)}; mergekit knows some others: {MERGEKIT_RUNS_IT}"
    )


def set_chat_template(template: str, models: Iterable[Checkpoint], folder: Path) -> None:
    """Write the chat template of an output, in the two places where loaders look for it.

    Args:
        template: the value of a recipe.
        models: the models, for ``auto``; the first of equally frequent templates counts.
        folder: folder of the output, with its other files.

    Raises:
        CheckpointError: a file of a model cannot be read.
        ConfigError: no model has a template.
    """
    if template == "auto":
        found = Counter(filter(None, (_template_of(model) for model in models)))
        if not found:
            raise ConfigError("chat_template: auto takes that of most models, but none has one; leave it out")
        text = found.most_common(1)[0][0]
    else:
        text = TEMPLATES.get(template, template)
    if (folder / CONFIG).is_file():
        config = read_json(folder / CONFIG)[0]
        write_json(folder / CONFIG, {**config, "chat_template": text})
    write_text(folder / FILE, text)


def _template_of(model: Checkpoint) -> str | None:
    """Return the default chat template of a model."""
    if model.main is None:
        return None
    file = model.main / FILE
    if file.is_file():
        try:
            return read_regular(file, _MOST_BYTES).decode("utf-8").strip() or None
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{file}: cannot be read: {error}") from error
    if not (model.main / CONFIG).is_file():
        return None
    found = read_json(model.main / CONFIG)[0].get("chat_template")
    if isinstance(found, list):
        named = [item for item in found if isinstance(item, dict)]
        found = next((item.get("template") for item in named if item.get("name") == "default"), None)
    return found.strip() or None if isinstance(found, str) else None
