"""What the package asks of the operating system, with a replacement where a system lacks the call.

Linux has all of it. macOS lacks ``fdatasync``, ``posix_fallocate`` and ``posix_fadvise``; Windows also lacks ``pread``,
``pwrite`` and flags of ``open``, syncs no folders, and renames neither open files nor onto existing folders.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

WINDOWS = sys.platform == "win32"
# Whether a command can be stopped with all processes that it started.
HAS_PROCESS_GROUPS = hasattr(os, "killpg")
KILL = getattr(signal, "SIGKILL", signal.SIGTERM)

# File systems that share parts of files share blocks of this size, at offsets that are multiples of it.
SHARED_BLOCK = 4096
# One call reads or writes no more: some systems refuse 2 GiB.
_MOST = 1 << 30
# Of file systems, or pairs of them, between which the system does not copy.
_NO_COPY = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.EPERM, errno.EIO)
# By descriptor: without pread and pwrite, moving to a place and using it must not be interrupted by another thread.
_positions: dict[int, threading.Lock] = {}


def open_descriptor(path: str | Path, flags: int) -> int:
    """Open a file in binary mode; a symbolic link of that name is refused, not followed.

    Raises:
        OSError: a link, or the system refused.
    """
    no_follow = getattr(os, "O_NOFOLLOW", 0)
    if not no_follow and Path(path).is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    return os.open(path, flags | no_follow | getattr(os, "O_BINARY", 0), 0o666)


def open_to_read(path: str | Path) -> int:
    """Open a file for reading in binary mode; where that matters, without waiting for the other end of a pipe.

    Raises:
        OSError: the system refused.
    """
    return os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))


def read_at(file: int, buffer: memoryview, offset: int) -> int:
    """Read from a place of a file into a buffer, from any thread; return the number of bytes, 0 at the end."""
    buffer = buffer[:_MOST]
    if hasattr(os, "preadv"):
        return os.preadv(file, [buffer], offset)
    if hasattr(os, "pread"):
        found = os.pread(file, len(buffer), offset)
    else:
        with _positions.setdefault(file, threading.Lock()):
            os.lseek(file, offset, os.SEEK_SET)
            found = os.read(file, len(buffer))
    buffer[: len(found)] = found
    return len(found)


def write_at(file: int, data: bytes | memoryview, offset: int) -> int:
    """Write to a place of a file, from any thread; return the number of bytes that were written."""
    data = data[:_MOST]
    if hasattr(os, "pwrite"):
        return os.pwrite(file, data, offset)
    with _positions.setdefault(file, threading.Lock()):
        os.lseek(file, offset, os.SEEK_SET)
        return os.write(file, data)


def copy_at(source: int, offset: int, target: int, place: int, count: int) -> bool:
    """Copy bytes from one open file into another without passing them through this process.

    File systems that can share blocks between files (Btrfs, XFS) then do, if the two places differ by a multiple of
    `SHARED_BLOCK`.

    Returns:
        Whether everything is copied. If not, the system or one of the file systems cannot, or the source is too short.

    Raises:
        OSError: writing failed, as on a full disk.
    """
    if not hasattr(os, "copy_file_range"):
        return False
    try:
        done = 0
        while done < count:
            # A call that does not begin at a block shares none: what is before the first block is copied apart.
            most = -(offset + done) % SHARED_BLOCK or _MOST
            copied = os.copy_file_range(source, target, min(most, count - done), offset + done, place + done)
            if not copied:
                return False
            done += copied
    except OSError as error:
        if error.errno in _NO_COPY:
            return False
        raise
    return True


def lock_descriptor(file: int) -> bool:
    """Lock an open file against other processes, and against this one if it opened the file again.

    The lock lives until the last process that has inherited the descriptor has closed it. POSIX only; otherwise use
    `filelock`.

    Returns:
        Whether it is locked: another may have it.
    """
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def signal_group(group: int, number: int) -> None:
    """Send a signal to all processes of a group; only where `HAS_PROCESS_GROUPS`."""
    os.killpg(group, number)


def reserve(file: int, size: int) -> None:
    """Give a new file its size. Where the system can, reserve the space, so that a full disk is noticed at once."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file, 0, size)
            return
        except OSError as error:  # some network file systems cannot
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
    if size:  # on Windows, ftruncate would write all the zeros
        write_at(file, b"\0", size - 1)


def reads_in_order(file: int) -> None:
    """Tell the system that a file will be read from the front to the back, if it listens."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_SEQUENTIAL)


def forget_pages(file: int, size: int) -> None:
    """Ask the system to drop what it cached of the first `size` bytes of a file, if it listens."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file, 0, size, os.POSIX_FADV_DONTNEED)


def begin_to_write_back(file: int, offset: int, size: int) -> None:
    """Let the system begin to put these bytes on disk, so that a later `sync` waits less; Linux can."""
    call = _sync_file_range()
    if call is not None:
        call(file, offset, size, 2)  # SYNC_FILE_RANGE_WRITE; a hint, so it may fail


@lru_cache
def _sync_file_range() -> Callable[..., int] | None:
    """Return Linux's call, which the module `os` lacks."""
    call: Any = getattr(ctypes.CDLL(None), "sync_file_range", None) if sys.platform == "linux" else None
    if call is not None:
        call.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    found: Callable[..., int] | None = call
    return found


def return_large_blocks() -> None:
    """Let glibc's malloc return freed blocks of 8 MiB and more at once, and keep the smaller ones for reuse.

    By itself it raises the size with every block that is freed, up to 32 MiB, and then keeps tensors that no other
    fits into.
    """
    call = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if call is not None:
        call(-3, 8 << 20)  # M_MMAP_THRESHOLD
        call(-1, 16 << 20)  # M_TRIM_THRESHOLD: twice as much, as by itself


def sync(file: int) -> None:
    """Put the content of a file safely on disk."""
    getattr(os, "fdatasync", os.fsync)(file)
    if sys.platform == "darwin":  # there, fsync leaves data in the cache of the drive
        import fcntl

        with suppress(OSError):  # a file system that cannot
            fcntl.fcntl(file, fcntl.F_FULLFSYNC)


def sync_path(path: Path) -> None:
    """Put a file, or the entries of a folder, safely on disk. Windows syncs no folders: its journal does.

    Raises:
        OSError: a symbolic link, or the system refused.
    """
    if WINDOWS and path.is_dir():
        return
    access = os.O_RDWR if WINDOWS else os.O_RDONLY | os.O_NONBLOCK  # Windows syncs what may be written
    file = open_descriptor(path, access)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def move_folder(source: Path, target: Path) -> None:
    """Rename a folder; it may replace an empty one. On Windows, no file in it may be open.

    Raises:
        OSError: something else has that name, or the system refused.
    """
    if WINDOWS:
        with suppress(FileNotFoundError):
            target.rmdir()
    source.rename(target)


def allocated(status: os.stat_result) -> int:
    """Return the bytes that a file takes on disk; its size where the system does not tell."""
    return getattr(status, "st_blocks", -(-status.st_size // 512)) * 512


def load() -> float:
    """Return how many processes each core serves, over the last minute; 1 on an idle machine or where nothing tells."""
    if not hasattr(os, "getloadavg"):
        return 1.0
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
