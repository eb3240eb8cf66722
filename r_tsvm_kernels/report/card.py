"""Write the model card of a merge: README.md, with the front matter that the Hugging Face hub reads."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ..files import open_regular
from ..safe_yaml import load_yaml
from ..text import printable

# Copied from the base's card: its terms apply to the merge too.
_INHERITED = ("license", "license_name", "license_link")
# Read no more than this of a card: its front matter is short.
_HEAD_BYTES = 1 << 16
_PROJECT = "r_tsvm_kernels"


def model_card(
    recipe: str,
    method: str,
    paper_url: str,
    base: str | None,
    models: Sequence[str],
    *,
    hub_ids: Sequence[str] = (),
    library: str | None = "transformers",
    inherited: Mapping[str, Any] | None = None,
) -> str:
    """Return the text of the card, in the form of mergekit's. Every run of one merge gives the same text.

    Args:
        recipe: YAML of the merge.
        method: name of the method, as printed.
        paper_url: where the method is defined.
        base: the base of the fine-tunes; None for methods without a base.
        models: the merged models.
        hub_ids: the models that are ids on the Hugging Face hub; only these are in the front matter.
        library: the library that loads the merge, as the hub spells it; None if unknown.
        inherited: the terms that `inherited_terms` read from the card of the base.
    """
    front = {
        **({"base_model": list(dict.fromkeys(hub_ids))} if hub_ids else {}),
        **({"library_name": library} if library else {}),
        "tags": ["merge", _PROJECT],
        **(inherited or {}),
    }
    title = ", ".join(dict.fromkeys(short_name(model) for model in models))
    listed = "\n".join(f"* {_code(model)}" for model in models)
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", recipe)), default=0))
    return f"""---
{yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip()}
---
# Merge of {_code(title)}

This model is a merge of fine-tuned models, made with {_PROJECT}.

## Method

[{method}]({paper_url}){f", with {_code(base)} as the base" if base else ""}.

## Models

{listed}

## Recipe

{fence}yaml
{recipe.strip()}
{fence}
"""


def short_name(model: str) -> str:
    """Return the last part of a model's path or id, without its revision."""
    is_id = "@" in model and not model.startswith(("/", "."))
    path = Path(model.partition("@")[0] if is_id else model)
    return path.name.removesuffix(".safetensors") or model


def inherited_terms(card: Path) -> dict[str, Any]:
    """Return the licence in a model card's front matter; an empty dict if there is none or it cannot be read."""
    try:
        with open_regular(card) as file:
            text = file.read(_HEAD_BYTES).decode("utf-8", "ignore")
        match = re.match(r"\ufeff?---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", text, re.DOTALL)
        front = load_yaml(match[1]) if match else None
    except (OSError, ValueError):
        return {}
    if not isinstance(front, dict):
        return {}
    return {key: front[key] for key in _INHERITED if _is_text(front.get(key))}


def _is_text(value: object) -> bool:
    if isinstance(value, list):
        return bool(value) and all(isinstance(item, str) for item in value)
    return isinstance(value, str)


def _code(text: str) -> str:
    """Return text as inline code, with enough backticks for those in the text."""
    text = printable(" ".join(text.split()))
    ticks = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{ticks} {text} {ticks}" if "`" in text else f"`{text}`"
