"""The output of a merge: staged beside its final place, and moved there in one step when it is complete."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..checkpoint import Checkpoint
from ..errors import CheckpointError, OutputExists

# Small files that a loader needs beside the weights; weights, indexes and model cards are made anew or left behind.
_COPIED_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".vocab", ".spm", ".py")
_COPIED_NAMES = ("LICENSE", "NOTICE")
_DTYPE_KEYS = ("torch_dtype", "dtype")


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """Yield a fresh folder; on success it becomes `out` (or its one .safetensors file does), on failure it vanishes.

    Raises:
        OutputExists: `out` is already in use.
        CheckpointError: the parent folder cannot be written.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
    except OSError as error:
        raise CheckpointError(f"{out.parent}: cannot be written: {error.strerror}") from error
    try:
        yield stage
        refuse_existing(out)
        _publish(stage, out)
    except OSError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{out}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def refuse_existing(out: Path) -> None:
    """Raise `OutputExists` unless `out` is free or an empty folder."""
    if out.is_symlink() or out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise OutputExists(f"{out}: already in use; remove it or choose another output")
    if out.is_dir() and is_single_file(out):
        raise OutputExists(f"{out}: a folder; an output that ends in .safetensors is a file")


def is_single_file(out: Path) -> bool:
    """Whether `out` asks for one .safetensors file instead of a folder."""
    return out.suffix == ".safetensors"


def report_path(out: Path) -> Path:
    """Return where the report of a merge into `out` lies."""
    return out.with_suffix(".merge_report.json") if is_single_file(out) else out / "merge_report.json"


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


def _publish(stage: Path, out: Path) -> None:
    # mkdtemp makes private folders; the output gets the permissions any new folder would have.
    mask = os.umask(0)
    os.umask(mask)
    if not is_single_file(out):
        stage.chmod(0o777 & ~mask)
        stage.rename(out)
        return
    (stage / report_path(out).name).rename(report_path(out))
    (stage / out.name).rename(out)
