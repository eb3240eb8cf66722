"""The small files beside the weights: configuration, tokenizer and licence of the base; JSON of ours."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from ..checkpoint import Checkpoint

# Small files that a loader needs beside the weights; weights, indexes and model cards are made anew or left behind.
_COPIED_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".vocab", ".spm", ".py")
_COPIED_NAMES = ("LICENSE", "NOTICE")
_DTYPE_KEYS = ("torch_dtype", "dtype")


def copy_companions(base: Checkpoint, stage: Path, dtype: str | None) -> None:
    """Copy configuration, tokenizer and licence files of the base; record a changed dtype in ``config.json``."""
    if base.folder is None:
        return
    for file in sorted(base.folder.iterdir()):
        wanted = file.suffix in _COPIED_SUFFIXES or file.name.startswith(_COPIED_NAMES)
        ours = file.name.endswith(".safetensors.index.json") or file.name in ("merge_report.json", "merge_recipe.yaml")
        if not (wanted and file.is_file()) or ours or file.name.endswith(".index.json") or file.name.startswith("."):
            continue
        if file.name == "config.json" and dtype is not None:
            config = _with_dtype(base.config, dtype)
            if not any(key in config for key in _DTYPE_KEYS):
                config["torch_dtype"] = dtype
            write_json(stage / file.name, config)
        else:
            shutil.copyfile(file, stage / file.name)


def write_json(file: Path, data: object) -> None:
    """Write indented JSON."""
    file.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Return a copy in which every recorded dtype, nested configs included, is `dtype`."""
    changed: dict[str, Any] = {}
    for key, value in config.items():
        if key in _DTYPE_KEYS and isinstance(value, str):
            changed[key] = dtype
        else:
            changed[key] = _with_dtype(value, dtype) if isinstance(value, dict) else value
    return changed
