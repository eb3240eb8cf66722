"""The folder of a sweep: locked while it runs, and left to nobody else."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..engine.output import writing
from ..errors import ConfigError, OutputBusyError, OutputExistsError
from ..system import HAS_PROCESS_GROUPS, lock_descriptor, open_descriptor
from .commands import end_orphan

JOURNAL = "sweep_journal.jsonl"
_LOCK = ".sweep.lock"
_WORK = "work"


def discard(folder: Path) -> None:
    """Remove a folder, if it is there, such that a kill at any moment leaves all of it or nothing under its name.

    A file, or a link, in its place is removed too; what a link leads to stays.
    """
    if folder.is_symlink() or folder.is_file():
        folder.unlink()
        return
    gone = folder.with_name(f".{folder.name}.gone")
    shutil.rmtree(gone, ignore_errors=True)
    with suppress(FileNotFoundError):
        folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


@contextmanager
def opened_folder(out: Path, restart: bool) -> Iterator[Path]:
    """Lock the folder of a sweep, end what a killed sweep has left running, and yield the folder for its work.

    Raises:
        ConfigError: the system cannot stop evaluations.
        OutputExistsError: the folder holds something else.
        OutputBusyError: another sweep has locked it.
    """
    if not HAS_PROCESS_GROUPS:
        raise ConfigError(
            "a sweep stops evaluations with all processes that they started, which Windows cannot do; run it on Linux, "
            "on macOS or in WSL"
        )
    ours = {JOURNAL, _LOCK}
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise OutputExistsError(f"{out}: exists and is not a folder; choose another output")
    if out.is_dir() and not (out / JOURNAL).exists() and {path.name for path in out.iterdir()} - ours:
        raise OutputExistsError(f"{out}: exists and holds no sweep; choose another output")
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        lock = open_descriptor(out / _LOCK, os.O_RDWR | os.O_CREAT)
    try:
        if not lock_descriptor(lock):
            raise OutputBusyError(f"{out}: another sweep into this folder is running; wait for it or stop it")
        work = out.absolute() / _WORK  # a command may change its folder
        for gone in out.glob(".*.gone"):
            shutil.rmtree(gone)
        for slot in sorted(work.glob("job-*")):
            end_orphan(slot)
            shutil.rmtree(slot)
        if restart:
            shutil.rmtree(work, ignore_errors=True)
        yield work
    finally:
        os.close(lock)
