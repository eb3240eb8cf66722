"""Copy the small files beside the weights of the base: configuration, tokenizer, code and licence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..checkpoint import SIDECAR_FOLDERS, Checkpoint, is_sidecar_file, read_json
from ..files import copy_file, write_json

_DTYPE_KEYS = ("torch_dtype", "dtype")


def copy_sidecar_files(base: Checkpoint, stage: Path, dtype: str | None) -> None:
    """Copy what belongs to the base beside its weights; record a changed dtype in ``config.json``.

    Args:
        base: nothing is copied of a bare file.
        stage: an existing folder; files of the same names are replaced.
        dtype: of the merged tensors, where it is not each tensor's own.

    Raises:
        CheckpointError: a file of the base cannot be read.
        OSError: the stage cannot be written.
    """
    if base.folder is None:
        return
    for folder in base.folders:
        for place in (folder, *(f"{folder}/{name}".lstrip("/") for name in SIDECAR_FOLDERS)):
            _copy_files(base.folder / place, stage / place)
    if dtype is not None:
        for module in base.modules:
            _record_dtype(stage / module.folder / "config.json", dtype, add=not module.prefix)


def _record_dtype(file: Path, dtype: str, add: bool) -> None:
    """Change the dtype in a configuration, if it is there; `add` it to one that has none."""
    if file.is_file():
        config = _with_dtype(read_json(file)[0], dtype)
        if add and not any(key in config for key in _DTYPE_KEYS):
            config["torch_dtype"] = dtype
        write_json(file, config)


def _copy_files(source: Path, target: Path) -> None:
    """Copy what belongs to a model from one of its folders, if it is there."""
    if source.is_dir():
        target.mkdir(parents=True, exist_ok=True)
        for file in sorted(source.iterdir()):
            # Links that lead nowhere are not left out in silence.
            if is_sidecar_file(file.name) and (file.is_file() or not file.exists()):
                copy_file(file, target / file.name)


def _with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Return a copy in which every recorded dtype, nested configs included, is `dtype`."""
    changed: dict[str, Any] = {}
    for key, value in config.items():
        if key in _DTYPE_KEYS and isinstance(value, str):
            changed[key] = dtype
        else:
            changed[key] = _with_dtype(value, dtype) if isinstance(value, dict) else value
    return changed
