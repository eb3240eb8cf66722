"""Where the output of a merge grows: a folder beside its final place, locked, and moved there when it is complete."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import CheckpointError, DiskFull, OutputBusy, OutputExists, RTsvmError


class Stage:
    """The folder in which an output grows, ``.OUT.partial`` beside OUT.

    Attributes:
        out: the final place.
        folder: the stage.
        journal: where the journal of the merge lies in it.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.folder = out.with_name(f".{out.name}.partial")
        self.journal = self.folder / journal_path(out).name

    def remove(self) -> None:
        """Remove the folder and all that is in it."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def publish(self) -> None:
        """Move what is in the folder to its final place, in one step, after all of it is safely on disk.

        Raises:
            OutputExists: the place was taken in the meantime.
        """
        refuse_existing(self.out)
        for file in self.folder.rglob("*"):
            _sync(file)
        _sync(self.folder)
        if is_single_file(self.out):
            for beside in (report_path(self.out), page_path(self.out), journal_path(self.out)):
                shutil.copyfile(self.folder / beside.name, beside)
                _sync(beside)
            (self.folder / self.out.name).rename(self.out)
            self.remove()
        else:
            self.folder.rename(self.out)
        _sync(self.out.parent)


@contextmanager
def locked_stage(out: Path) -> Iterator[Stage]:
    """Yield the stage of `out`, which no other merge can enter inside the ``with`` block.

    Raises:
        OutputBusy: another merge is in it.
        OutputExists: `out` is in use.
        CheckpointError: the folder of `out` cannot be written.
    """
    place = out.parent.resolve() / out.name
    lock_file = place.with_name(f".{place.name}.partial.lock")
    with writing(out):
        place.parent.mkdir(parents=True, exist_ok=True)
        lock = _lock(lock_file)
    try:
        refuse_existing(place)
        yield Stage(place)
    finally:
        lock_file.unlink(missing_ok=True)
        os.close(lock)


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
    return _beside(out, "merge_report.json")


def page_path(out: Path) -> Path:
    """Return where the page that shows the report of a merge into `out` lies."""
    return _beside(out, "merge_report.html")


def journal_path(out: Path) -> Path:
    """Return where the journal of a merge into `out` lies."""
    return _beside(out, "merge_journal.jsonl")


def _beside(out: Path, name: str) -> Path:
    return out.with_suffix(f".{name}") if is_single_file(out) else out / name


def _lock(file: Path) -> int:
    """Return a descriptor of the lock file that holds its lock."""
    while True:
        lock = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise OutputBusy(f"{file}: another merge into this output is running; wait for it or stop it") from None
        # The merge that held the lock removes the file when it ends; the lock of a removed file keeps nobody out.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock), file.stat()):
                return lock
        os.close(lock)


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Say which output could not be written when the system refuses.

    Raises:
        DiskFull, CheckpointError: instead of any other OSError.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, RTsvmError):
            raise
        kind = DiskFull if error.errno in (errno.ENOSPC, errno.EDQUOT) else CheckpointError
        raise kind(f"{out}: cannot be written: {error.strerror or error}") from error


def _sync(path: Path) -> None:
    """Return when a file, or the entries of a folder, would survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
