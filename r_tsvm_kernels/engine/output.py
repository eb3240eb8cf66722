"""The stage of an output: a locked folder beside the final place, moved there when the output is complete."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, SoftFileLock, Timeout

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
from ..system import sync_path

# Bytes in a name, on all file systems that matter.
_NAME_MAX = 255


class Stage:
    """The folder that an output is written to, ``.OUT.partial`` beside OUT.

    Attributes:
        out: the final place.
        folder: the stage.
        journal: path of the journal in the stage.
        published: whether the output is complete and in its final place. Later failures do not change that.
    """

    published = False

    def __init__(self, out: Path) -> None:
        self.out = out
        self.folder = out.with_name(f".{out.name}.partial")
        self.journal = self.folder / journal_path(out).name

    def remove(self) -> None:
        """Remove the folder and its contents, the journal last: it shows whose the rest is if the removal is killed."""
        if not self.folder.is_symlink():
            with suppress(OSError):
                for place in self.folder.iterdir():
                    if place.is_dir() and not place.is_symlink():
                        shutil.rmtree(place, ignore_errors=True)
                    elif place != self.journal:
                        place.unlink()
        shutil.rmtree(self.folder, ignore_errors=True)

    def refuse_foreign(self, ours: Collection[str] = ()) -> None:
        """Raise unless the folder may be emptied: it is missing or empty, or one of our commands left it.

        Args:
            ours: names of the files of a command that keeps no journal.

        Raises:
            OutputUnfinishedError: the folder holds no journal and other files than `ours`, or is not a folder.
        """
        if not _is_taken(self.folder):
            return
        is_folder = self.folder.is_dir() and not self.folder.is_symlink()
        found = {path.name for path in self.folder.iterdir()} if is_folder else {""}
        if self.journal.name not in found and not found <= {*ours, *map(part_name, ours)}:
            raise OutputUnfinishedError(
                f"{self.folder}: not left by a merge, because it holds no journal; remove it, or choose another output"
            )

    def publish(self) -> None:
        """Sync the folder and move its contents to the final place: everything, or nothing.

        Raises:
            OutputExistsError: the final place is taken now.
            OSError: writing failed.
        """
        refuse_existing(self.out)
        for file in self.folder.rglob("*"):
            sync_path(file)
        sync_path(self.folder)
        places = _places(self.out) if is_single_file(self.out) else {self.folder: self.out}
        done: dict[Path, Path] = {}
        try:
            for source, place in places.items():
                publish(source, place)
                done[source] = place
            sync_path(self.out.parent)
        except BaseException as error:
            for source, place in done.items():
                place.replace(source)  # on POSIX, no effect if both are links to one file
                place.unlink(missing_ok=True)
            if isinstance(error, FileExistsError):
                raise OutputExistsError(
                    f"{self.out}: created by another process during the merge; remove it"
                ) from error
            raise
        self.published = True
        self.remove()

    def settle(self) -> None:
        """Clean up after a publication that was killed: undo it, or remove the stage if everything is in its place."""
        if same_file(self.folder / self.out.name, self.out):
            self.remove()
        for source, place in _places(self.out).items():
            if same_file(source, place):
                place.unlink()


@contextmanager
def locked_stage(out: Path) -> Iterator[Stage]:
    """Yield the stage of `out`, locked against other merges for the ``with`` block.

    Raises:
        OutputBusyError: another merge has locked it.
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
        with suppress(OSError):  # a lock file without its lock stops no other merge; Windows removes no open file
            lock_file.unlink()
        lock.release()


def refuse_existing(out: Path) -> None:
    """Raise unless `out` is free or an empty folder. For a single file, the files beside it must be free, too.

    Raises:
        ConfigError: `out` cannot be the name of an output.
        OutputExistsError: the place is taken, possibly by a dangling link.
    """
    single = is_single_file(out)
    try:
        if out.name in ("", ".."):
            raise ValueError("it ends without a name")
        longest = _lock_file(out)
        if len(os.fsencode(longest.name)) > _NAME_MAX:  # the system reports it only if the folder exists
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
    """Whether a path exists, possibly as a dangling link."""
    try:
        place.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _places(out: Path) -> dict[Path, Path]:
    """Map the files in the stage of a single file to their places; the weights, which complete the output, are last."""
    folder = Stage(out).folder
    return {folder / place.name: place for place in (report_path(out), page_path(out), journal_path(out), out)}


def _lock_file(out: Path) -> Path:
    return out.with_name(f".{out.name}.partial.lock")


def is_single_file(out: Path) -> bool:
    """Whether `out` asks for one .safetensors file instead of a folder."""
    return out.suffix == ".safetensors"


def report_path(out: Path) -> Path:
    """Return the path of the report of a merge into `out`."""
    return _beside(out, "merge_report.json")


def page_path(out: Path) -> Path:
    """Return the path of the report page of a merge into `out`."""
    return _beside(out, "merge_report.html")


def journal_path(out: Path) -> Path:
    """Return the path of the journal of a merge into `out`."""
    return _beside(out, "merge_journal.jsonl")


def _beside(out: Path, name: str) -> Path:
    return out.with_suffix(f".{name}") if is_single_file(out) else out / name


def _lock(file: Path) -> FileLock:
    """Return the lock of a lock file, acquired."""
    with suppress(FileNotFoundError):
        found = file.lstat()
        if stat.S_ISLNK(found.st_mode):
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        written = found.st_size and FileLock is not SoftFileLock  # which notes its owner: systems without locks
        if not stat.S_ISREG(found.st_mode) or written:
            raise OutputExistsError(
                f"{file}: not the lock of a merge, which is an empty file; remove it or choose another output"
            )
    lock = FileLock(file, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise OutputBusyError(f"{file}: another merge into this output is running; wait for it or stop it") from None
    except NotImplementedError as error:
        raise OSError(f"its file system knows no locks ({error})") from error
    return lock


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Turn an OSError of the ``with`` block into an error that names the output.

    Raises:
        DiskFullError: the disk is full.
        CheckpointError: any other OSError.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, RtsvmError):
            raise
        kind = DiskFullError if error.errno in (errno.ENOSPC, errno.EDQUOT) else CheckpointError
        raise kind(f"{out}: cannot be written: {error.strerror or error}") from error
