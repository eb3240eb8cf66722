"""Verdicts, and the files in the user's cache that keep them: one for each kind of device and each software on it."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .. import __version__
from ..files import read_regular, write_json

PACKAGE = Path(__file__).resolve().parents[1]
# Increased when files of older versions mean something else.
_FORMAT = 1
_MOST_BYTES = 1 << 22  # of a file of verdicts


@dataclass(frozen=True)
class Verdict:
    """What the self-check of a kernel found.

    Attributes:
        passed: whether the kernel may be used.
        reason: why not; empty if it may.
        error: largest distance from the reference, relative to the largest element; 0 for the same bits, None for
            infinity.
        seconds: of one call at a realistic size; None if it was not timed.
        cases: number of calls that were compared.
        took: seconds of the check.
    """

    passed: bool
    reason: str = ""
    error: float | None = None
    seconds: float | None = None
    cases: int = 0
    took: float = 0.0


# Stands for a kernel that could not be checked now. It is never stored.
UNCHECKED = Verdict(False, "it has not been checked yet, because the time or the means for it did not suffice")


@dataclass(frozen=True)
class _File:
    format: int
    circumstances: dict[str, str]
    verdicts: dict[str, dict[str, Verdict]]


@dataclass(frozen=True)
class Place:
    """Where the verdicts of a device are kept.

    Attributes:
        path: of the file.
        circumstances: everything that verdicts depend on.
    """

    path: Path
    circumstances: dict[str, str]


def combined(verdicts: Sequence[Verdict]) -> Verdict:
    """Return the verdict on several kinds of devices, from one that passed on each."""
    times = [verdict.seconds for verdict in verdicts]
    known = [seconds for seconds in times if seconds is not None]
    errors = [verdict.error for verdict in verdicts if verdict.error is not None]
    seconds = math.fsum(known) if len(known) == len(times) else None
    return Verdict(True, "", max(errors, default=None), seconds, sum(verdict.cases for verdict in verdicts))


def cache_folder() -> Path:
    """Return the folder of what can be computed again: ``RTSVM_CACHE``, or a folder in the user's cache."""
    own = os.environ.get("RTSVM_CACHE")
    if own:
        return Path(own)
    shared = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification says that relative paths are to be ignored.
    folder = Path(shared) if Path(shared).is_absolute() else Path(os.path.expanduser("~"), ".cache")  # noqa: PTH111
    return folder / "r_tsvm_kernels"


def any_stored(device: str) -> bool:
    """Whether there may be verdicts of a device: a look into a folder, which saves the hash of all sources."""
    try:
        return any((cache_folder() / "selfcheck").glob(f"{device.partition(':')[0]}-*.json"))
    except OSError:
        return False


def place_of(device: str) -> Place:
    """Return where the verdicts of a device are kept."""
    facts = circumstances(device)
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    name = re.sub(r"[^a-z0-9]+", "-", facts["device"].lower()).strip("-")[:60]
    return Place(cache_folder() / "selfcheck" / f"{device.partition(':')[0]}-{name}-{digest}.json", facts)


@contextmanager
def locked(place: Place, seconds: float = -1) -> Iterator[None]:
    """Lock the file of a place against other processes for the ``with`` block; go on without after so many seconds.

    Raises:
        OSError: the folder cannot be written, or its file system knows no locks.
    """
    from filelock import FileLock, Timeout

    place.path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(place.path.with_suffix(".lock"))
    try:
        lock.acquire(timeout=seconds)
    except Timeout:
        pass
    except NotImplementedError as error:
        raise OSError(str(error)) from error
    try:
        yield
    finally:
        lock.release()


def read(place: Place) -> dict[str, dict[str, Verdict]]:
    """Return the stored verdicts of a place; none if its file is missing, damaged, or of other circumstances."""
    from pydantic import TypeAdapter, ValidationError  # not at every start

    try:
        found = TypeAdapter(_File).validate_json(read_regular(place.path, _MOST_BYTES))
    except (OSError, ValidationError, RecursionError):
        return {}
    matches = found.format == _FORMAT and found.circumstances == place.circumstances
    return found.verdicts if matches else {}


def add(place: Place, new: dict[str, dict[str, Verdict]]) -> None:
    """Store verdicts beside, or in place of, those that are there; the caller holds the lock.

    Raises:
        OSError: the disk refused.
    """
    verdicts = read(place)
    for op, found in new.items():
        verdicts[op] = verdicts.get(op, {}) | found
    content = {"format": _FORMAT, "circumstances": place.circumstances, "verdicts": as_json(verdicts)}
    write_json(place.path, content)


def as_json(verdicts: dict[str, dict[str, Verdict]]) -> dict[str, Any]:
    """Return verdicts as JSON."""
    return {op: {backend: asdict(verdict) for backend, verdict in found.items()} for op, found in verdicts.items()}


def name_of(device: str) -> str:
    """Return the name of a device for people."""
    return circumstances(device)["device"]


@cache
def circumstances(device: str) -> dict[str, str]:
    """Return everything that a verdict depends on: the device, its driver, the software, the sources of the kernels."""
    import torch

    facts = {"device": _processor(), "capability": torch.backends.cpu.get_cpu_capability(), "driver": ""}
    if device.startswith("cuda"):
        major, minor = torch.cuda.get_device_capability(device)
        facts = {
            "device": torch.cuda.get_device_name(device),
            "capability": f"{major}.{minor}",
            "driver": _driver(),
        }
    return facts | {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "r_tsvm_kernels": __version__,
        "sources": _sources(),
    }


def _driver() -> str:
    try:
        return Path("/sys/module/nvidia/version").read_text(encoding="utf-8").strip()
    except OSError:
        import torch

        return str(getattr(torch._C, "_cuda_getDriverVersion", lambda: "")())


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _processor() -> str:
    """Return the name of the processor."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match[1].strip() if match else platform.processor() or platform.machine()


@cache
def _sources() -> str:
    """Return a hash of the ops and of the native modules."""
    digest = hashlib.sha256()
    for path in sorted([*(PACKAGE / "ops").rglob("*.py"), *PACKAGE.glob("_*.so"), *PACKAGE.glob("_*.pyd")]):
        digest.update(f"{path.relative_to(PACKAGE)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]
