"""Safe access to files: read only regular ones, write through no link, overwrite nothing."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader, BufferedWriter
from pathlib import Path

from .errors import CheckpointError
from .system import move_folder, open_descriptor, open_to_read

_KINDS = {
    stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
}  # fmt: skip
# Errors of file systems without hard links; EINVAL is Windows' "incorrect function".
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EINVAL)


def open_regular(path: str | Path) -> BufferedReader:
    """Open a regular file for reading. A pipe or a device would block, or never end.

    Args:
        path: of the file, or of a link to it.

    Raises:
        OSError: missing, not readable, or not a regular file.
    """
    try:
        _require_regular(Path(path).stat().st_mode)  # before opening it, which alone can make a device act
        descriptor = open_to_read(path)
    except ValueError as error:
        raise OSError(f"not a path: {error}") from error
    try:
        _require_regular(os.fstat(descriptor).st_mode)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_regular(path: str | Path, most: int) -> bytes:
    """Read a whole regular file.

    Raises:
        OSError: as `open_regular`, or the file has more than `most` bytes.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        content = file.read(most + 1) if size <= most else None
    if content is None or len(content) > most:
        raise OSError(f"larger than {most} bytes")
    return content


def exists(path: str | Path) -> bool:
    """Whether something exists at a path; False if the name is too long or holds a NUL."""
    return os.path.exists(path)  # noqa: PTH110  # Path.exists raises on such names


def usable_path(path: str | Path) -> Path:
    """Return the path; check that the system can look it up, whether or not something is there.

    Raises:
        CheckpointError: it cannot: a name is too long or holds a NUL, links form a circle, or a folder is not readable.
    """
    try:
        Path(path).stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be looked up: {error.strerror or error}") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: not a path: {error}") from error
    return Path(path)


def write_text(path: Path, text: str) -> None:
    """Write a file in UTF-8, and move it into place in one step: a link of that name is replaced, not followed.

    Raises:
        OSError: the disk refused.
    """
    with _replaced(path) as file:
        file.write(text.encode("utf-8"))


def write_json(path: Path, data: object) -> None:
    """Write indented JSON, as `write_text` writes."""
    write_text(path, json.dumps(data, indent=2) + "\n")


def copy_file(source: Path, target: Path) -> None:
    """Copy the content of a regular file, as `write_text` writes.

    Raises:
        CheckpointError: the source cannot be read, or is not a regular file.
        OSError: the disk refused the copy.
    """
    try:
        opened = open_regular(source)
    except OSError as error:
        raise CheckpointError(f"{source}: cannot be read: {error.strerror or error}") from error
    with opened, _replaced(target) as file:
        shutil.copyfileobj(opened, file)


@contextmanager
def _replaced(path: Path) -> Iterator[BufferedWriter]:
    part = path.with_name(part_name(path.name))
    part.unlink(missing_ok=True)  # left by a process that was killed
    descriptor = open_descriptor(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
        part.replace(path)
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise


def part_name(name: str) -> str:
    """Return the temporary name under which `write_text` writes a file."""
    return f".{name}.new"


def publish(source: Path, target: Path) -> None:
    """Move a finished file or folder to its name, which must be free; a folder may replace an empty one.

    If the file system has hard links, a file keeps its old name as well.

    Raises:
        FileExistsError: something has that name, possibly a dangling link.
        OSError: the disk refused.
    """
    if source.is_dir():
        move_folder(source, target)
        return
    try:
        link = getattr(os, "link", _no_link)
        link(source, target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        os.close(open_descriptor(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        source.replace(target)


def _no_link(source: Path, target: Path) -> None:
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))


def same_file(one: Path, other: Path) -> bool:
    """Whether two names, neither of them a symbolic link, refer to the same existing file."""
    try:
        return os.path.samestat(one.lstat(), other.lstat())
    except OSError:
        return False


def _require_regular(mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise OSError(f"{_KINDS.get(stat.S_IFMT(mode), 'something else')}, not a regular file")
