"""Where the output of a merge grows: a folder beside its final place, locked, and moved there when it is complete."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import (
    CheckpointError,
    ConfigError,
    DiskFullError,
    OutputBusyError,
    OutputExistsError,
    OutputUnfinishedError,
    RtsvmError,
)
from ..files import part_name, publish, same_file

# Bytes in a name, on all file systems that matter.
_NAME_MAX = 255


class Stage:
    """The folder in which an output grows, ``.OUT.partial`` beside OUT.

    Attributes:
        out: the final place.
        folder: the stage.
        journal: where the journal of the merge lies in it.
        published: whether the output is complete and in its place; nothing that fails later can change that.
    """

    published = False

    def __init__(self, out: Path) -> None:
        self.out = out
        self.folder = out.with_name(f".{out.name}.partial")
        self.journal = self.folder / journal_path(out).name

    def remove(self) -> None:
        """Remove the folder and all that is in it."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def refuse_foreign(self, ours: Collection[str] = ()) -> None:
        """Raise unless the folder may be emptied: it is not there, it is empty, or a command of ours left it.

        Args:
            ours: names of the files of a command that keeps no journal.

        Raises:
            OutputUnfinishedError: it holds neither a journal nor `ours` alone, or it is no folder.
        """
        if not _is_taken(self.folder):
            return
        is_folder = self.folder.is_dir() and not self.folder.is_symlink()
        found = {path.name for path in self.folder.iterdir()} if is_folder else {""}
        if self.journal.name not in found and not found <= {*ours, *map(part_name, ours)}:
            raise OutputUnfinishedError(
                f"{self.folder}: no merge left it, it holds no journal; remove it, or choose another output"
            )

    def publish(self) -> None:
        """Move what is in the folder to its final place after all of it is safely on disk: all of it, or nothing.

        Raises:
            OutputExistsError: the place was taken in the meantime.
            OSError: the disk refused.
        """
        refuse_existing(self.out)
        for file in self.folder.rglob("*"):
            _sync(file)
        _sync(self.folder)
        places = _places(self.out) if is_single_file(self.out) else {self.folder: self.out}
        done: dict[Path, Path] = {}
        try:
            for source, place in places.items():
                publish(source, place)
                done[source] = place
            _sync(self.out.parent)
        except BaseException as error:
            for source, place in done.items():
                place.rename(source)  # without effect where both are links of one file
                place.unlink(missing_ok=True)
            if isinstance(error, FileExistsError):
                raise OutputExistsError(f"{self.out}: taken during the merge; remove what is there") from error
            raise
        self.published = True
        self.remove()

    def settle(self) -> None:
        """End a publication that was killed: it is undone, or, if all is in its place, the folder goes."""
        if same_file(self.folder / self.out.name, self.out):
            self.remove()
        for source, place in _places(self.out).items():
            if same_file(source, place):
                place.unlink()


@contextmanager
def locked_stage(out: Path) -> Iterator[Stage]:
    """Yield the stage of `out`, which no other merge can enter inside the ``with`` block.

    Raises:
        OutputBusyError: another merge is in it.
        ConfigError, OutputExistsError: see `refuse_existing`.
        CheckpointError: the folder of `out` cannot be written.
    """
    refuse_existing(out)
    with writing(out):
        place = out.parent.resolve() / out.name
        lock_file = _lock_file(place)
        place.parent.mkdir(parents=True, exist_ok=True)
        lock = _lock(lock_file)
    try:
        stage = Stage(place)
        with writing(out):
            stage.settle()
        refuse_existing(place)
        yield stage
    finally:
        with suppress(OSError):  # the file alone, without its lock, keeps nobody out
            lock_file.unlink()
        os.close(lock)


def refuse_existing(out: Path) -> None:
    """Raise unless `out` is free or an empty folder; if it is a single file, also what goes beside it must be free.

    Raises:
        ConfigError: `out` cannot be the name of an output.
        OutputExistsError: something is there, be it a link to nowhere.
    """
    single = is_single_file(out)
    try:
        if out.name in ("", ".."):
            raise ValueError("no name is at its end")
        longest = _lock_file(out)
        if len(os.fsencode(longest.name)) > _NAME_MAX:  # the system says so only where there is a folder already
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        _is_taken(longest)
        if single:
            taken = [
                place for source, place in _places(out).items() if _is_taken(place) and not same_file(source, place)
            ]
        else:
            is_empty_folder = out.is_dir() and not out.is_symlink() and not any(out.iterdir())
            taken = [out] if _is_taken(out) and not is_empty_folder else []
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{out}: cannot be the name of an output: {reason}; choose another") from error
    if single and out in taken and out.is_dir():
        raise OutputExistsError(f"{out}: a folder; an output that ends in .safetensors is a file")
    if taken:
        finished = _finished(out)
        found = f"{out}: a finished {finished} is there" if finished else f"{taken[0]}: already in use"
        raise OutputExistsError(f"{found}; remove it or choose another output")


def _finished(out: Path) -> str:
    """Return what is complete at `out`, a merge or an adapter; empty for anything else."""
    if out.exists() and journal_path(out).is_file() and report_path(out).is_file():
        return "merge"
    return "adapter" if (out / "adapter_config.json").is_file() else ""


def _is_taken(place: Path) -> bool:
    """Whether something has a name, be it a link to nowhere."""
    try:
        place.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _places(out: Path) -> dict[Path, Path]:
    """Map the files in the stage of a single file to their places; the weights, which complete it, come last."""
    folder = Stage(out).folder
    return {folder / place.name: place for place in (report_path(out), page_path(out), journal_path(out), out)}


def _lock_file(out: Path) -> Path:
    return out.with_name(f".{out.name}.partial.lock")


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
        lock = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise OutputBusyError(
                f"{file}: another merge into this output is running; wait for it or stop it"
            ) from None
        found = os.fstat(lock)
        if not stat.S_ISREG(found.st_mode) or found.st_size:
            os.close(lock)
            raise OutputExistsError(
                f"{file}: not the lock of a merge, which is an empty file; remove it or choose another output"
            )
        # The merge that held the lock removes the file when it ends; the lock of a removed file keeps nobody out.
        with suppress(FileNotFoundError):
            if os.path.samestat(found, file.stat()):
                return lock
        os.close(lock)


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Say which output could not be written when the system refuses.

    Raises:
        DiskFullError, CheckpointError: instead of any other OSError.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, RtsvmError):
            raise
        kind = DiskFullError if error.errno in (errno.ENOSPC, errno.EDQUOT) else CheckpointError
        raise kind(f"{out}: cannot be written: {error.strerror or error}") from error


def _sync(path: Path) -> None:
    """Return when a file, or the entries of a folder, would survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
