"""The model card of a merge: README.md with the front matter that the Hugging Face hub reads."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ..files import open_regular
from ..safe_yaml import load_yaml
from ..text import printable

# What is taken over from the base's card, if it says so: its terms hold for the merge too.
_INHERITED = ("license", "license_name", "license_link")
# A card's front matter is short; more than this is not read.
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
    """Write the card, in the form of mergekit's; it says nothing that differs from one run of the merge to the next.

    Args:
        recipe: the YAML of the merge.
        method: name of the method, as printed.
        paper_url: where it is defined.
        base: the model that the others are fine-tunes of; None for methods that need none.
        models: those that were merged.
        hub_ids: which of all these are ids on the Hugging Face hub; the front matter names no others.
        library: that loads the merge, as the hub spells it; None if it is not known.
        inherited: what `inherited_terms` found in the card of the base.
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

This model was made by merging fine-tuned models with {_PROJECT}.

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
    """Return the last part of a model's path or id, without the revision."""
    is_id = "@" in model and not model.startswith(("/", "."))
    path = Path(model.partition("@")[0] if is_id else model)
    return path.name.removesuffix(".safetensors") or model


def inherited_terms(card: Path) -> dict[str, Any]:
    """Return the licence that a model card names in its front matter; nothing if there is none that can be read."""
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
    """Return text as inline code, whatever is in it."""
    text = printable(" ".join(text.split()))
    ticks = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{ticks} {text} {ticks}" if "`" in text else f"`{text}`"
