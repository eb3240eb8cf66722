"""Copy the small files beside the weights of the base: configuration, tokenizer, code and licence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..checkpoint import (
    SIDECAR_FOLDERS,
    Checkpoint,
    is_sidecar_file,
    read_json,
    with_layers,
    without_quantisation,
)
from ..files import copy_file, write_json
from ..plan import MergePlan

_DTYPE_KEYS = ("torch_dtype", "dtype")


def copy_sidecar_files(base: Checkpoint, stage: Path, dtype: str | None, *, quantised: bool = False) -> None:
    """Copy the sidecar files of the base; record a changed dtype in ``config.json``, and that nothing is quantised.

    Args:
        base: the base; a single file has no sidecar files.
        stage: an existing folder; files of the same names are replaced.
        dtype: dtype of the merged tensors; None if each tensor keeps its own.
        quantised: whether the output is in the base's FP8 layout.

    Raises:
        CheckpointError: a file of the base cannot be read.
        OSError: the stage cannot be written.
    """
    if base.folder is None:
        return
    for folder in base.folders:
        for place in (folder, *(f"{folder}/{name}".lstrip("/") for name in SIDECAR_FOLDERS)):
            copy_files(base.folder / place, stage / place)
    for module in base.modules:
        file = stage / module.folder / "config.json"
        if base.is_scaled and not quantised and file.is_file():
            write_json(file, without_quantisation(read_json(file)[0]))
        if dtype is not None:
            _record_dtype(file, dtype, add=not module.prefix)


def fit_layers(plan: MergePlan, stage: Path) -> None:
    """Make ``config.json`` of an output describe its layers, if they are others than the base's.

    Raises:
        CheckpointError: it cannot be read.
        OSError: the stage cannot be written.
    """
    main = next((module.folder for module in plan.base.modules if not module.prefix), "")
    file = stage / main / "config.json"
    if plan.layers and file.is_file():
        write_json(file, with_layers(read_json(file)[0], [(model.config, index) for model, index in plan.layers]))


def _record_dtype(file: Path, dtype: str, add: bool) -> None:
    """Change the dtype in a configuration file, if the file exists; `add` it if the configuration has none."""
    if file.is_file():
        config = _with_dtype(read_json(file)[0], dtype)
        if add and not any(key in config for key in _DTYPE_KEYS):
            config["torch_dtype"] = dtype
        write_json(file, config)


def copy_files(source: Path, target: Path, wanted: Callable[[str], bool] = is_sidecar_file) -> None:
    """Copy the sidecar files of one folder of a model, if the folder exists."""
    if source.is_dir():
        target.mkdir(parents=True, exist_ok=True)
        for file in sorted(source.iterdir()):
            # Dangling links raise an error instead of being skipped.
            if wanted(file.name) and (file.is_file() or not file.exists()):
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
