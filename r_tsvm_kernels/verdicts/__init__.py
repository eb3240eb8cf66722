"""What is known of the kernels on the devices of this machine, from self-checks that ran there.

`dispatch` asks here. Before a kernel is used for the first time on a GPU, `require` has it checked: by other processes
(`children`), because a kernel that crashes or writes where it must not takes its process along, and one that hangs
never returns. The verdicts are stored (`store`), and nothing that has one is checked again. A process reads the
stored ones once and keeps to them, so a choice never changes during a merge. Kernels on the CPU, which the test suite
runs, are checked by `rtsvm selfcheck --device cpu` only; a failed check there counts as well.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache

from ..errors import ConfigError
from . import children, store
from .store import UNCHECKED, Verdict

__all__ = ["BUDGET", "CHECKED", "UNCHECKED", "Verdict", "check", "devices", "enabled", "forget", "known", "require"]

_LOG = logging.getLogger(__name__)

# Types of devices whose kernels are checked before they are used.
CHECKED = frozenset({"cuda"})
# Seconds for all checks that the first use of kernels waits for. What was not reached is left for the next process.
BUDGET = 60.0

# op -> backend -> verdict
Verdicts = dict[str, dict[str, Verdict]]

_lock = threading.RLock()
_known: dict[str, Verdicts] = {}  # by device, what this process keeps to
_told: set[tuple[str, ...]] = set()
_complete: set[tuple[str, str, tuple[str, ...]]] = set()  # type of device, op, backends: all have verdicts


def enabled() -> bool:
    """Whether verdicts count: ``RTSVM_SELFCHECK=off`` leaves the automatic choice to the references on a GPU.

    So does an export of the package that has no self-checks.

    Raises:
        ConfigError: another value than ``on`` and ``off``.
    """
    value = os.environ.get("RTSVM_SELFCHECK") or "on"
    if value not in ("on", "off"):
        raise ConfigError(f"RTSVM_SELFCHECK must be on or off, got {value!r}")
    return value == "on" and (store.PACKAGE / "selfcheck").is_dir()


def known(op: str, device_type: str) -> dict[str, Verdict]:
    """Return by backend what is known of an op on all devices of a type, without checking anything.

    A kernel has passed if it has on every kind of device. Its time is the sum over the kinds.
    """
    if not enabled():
        return {}
    found = [_of(device).get(op, {}) for device in devices(device_type)]
    shared = set(found[0]).intersection(*found[1:]) if found else set()
    failed = {backend: v for verdicts in found for backend, v in verdicts.items() if not v.passed}
    return {backend: store.combined([verdicts[backend] for verdicts in found]) for backend in shared} | failed


def require(kernels: Mapping[str, Sequence[str]], device_type: str) -> None:
    """Check those of the kernels that have no verdict on devices of a type, if kernels are checked there.

    It takes `BUDGET` seconds at most, once; afterwards the verdicts are stored. Where the cache cannot be written, they
    hold for this process.

    Args:
        kernels: backends by op, without the reference.
        device_type: ``cpu`` or ``cuda``.
    """
    if device_type not in CHECKED or not enabled():
        return
    asked = {(device_type, op, tuple(names)) for op, names in kernels.items()}
    if asked <= _complete:
        return
    with _lock:
        for device in devices(device_type):
            missing = _without_verdict(kernels, _of(device))
            if missing:
                _obtain(device, missing)
            _tell_failures(device, kernels)
        _complete.update(asked)


def check(
    device: str, kernels: Mapping[str, Sequence[str]], progress: Callable[[str], None] = lambda what: None
) -> Verdicts:
    """Check kernels on a device, whether or not they have verdicts, for as long as it takes; store what is found.

    Args:
        device: such as ``cuda:0``.
        kernels: backends by op, without the reference.
        progress: called with what is checked next.

    Returns:
        The verdicts; see `children.run_checks`.
    """
    found = children.run_checks(device, kernels, progress=progress)
    place = store.place_of(device)
    with _locked(place, -1):
        _store(place, found)
    return found


@cache
def devices(device_type: str) -> tuple[str, ...]:
    """Return one device of each kind that this process sees, such as ``cuda:0``."""
    if device_type != "cuda":
        return (device_type,)
    import torch

    first: dict[tuple[str, tuple[int, int]], str] = {}
    for index in range(torch.cuda.device_count()):
        kind = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
        first.setdefault(kind, f"cuda:{index}")
    return tuple(first.values())


def forget() -> None:
    """Forget what this process knows; stored verdicts are read again."""
    with _lock:
        _known.clear()
        _told.clear()
        _complete.clear()


def _of(device: str) -> Verdicts:
    """Return what this process knows of a device; at the first call, what is stored."""
    if device not in _known:
        with _lock:
            if device not in _known:
                _known[device] = store.read(store.place_of(device)) if store.any_stored(device) else {}
    return _known[device]


def _obtain(device: str, missing: Mapping[str, Sequence[str]]) -> None:
    """Add verdicts of these kernels to what is known: stored ones, or new ones, which are stored."""
    place = store.place_of(device)
    deadline = time.monotonic() + BUDGET
    with _locked(place, BUDGET):  # another process may be checking the same
        found = store.read(place)
        left = _without_verdict(missing, found)
        if left:
            new = _announced(device, left, deadline)
            _store(place, new)
            found = {op: found.get(op, {}) | new.get(op, {}) for op in missing}
    for op, names in missing.items():
        verdicts = found.get(op, {})
        _known[device][op] = dict.fromkeys(names, UNCHECKED) | _known[device].get(op, {}) | verdicts


def _without_verdict(kernels: Mapping[str, Sequence[str]], found: Verdicts) -> dict[str, list[str]]:
    left = {op: [name for name in names if name not in found.get(op, {})] for op, names in kernels.items()}
    return {op: names for op, names in left.items() if names}


@contextmanager
def _locked(place: store.Place, seconds: float) -> Iterator[None]:
    """Lock the file of a place against other processes, if it can be locked."""
    with ExitStack() as stack:
        try:
            stack.enter_context(store.locked(place, seconds))
        except OSError as error:
            _tell_unwritable(error)
        yield


def _store(place: store.Place, found: Verdicts) -> None:
    try:
        store.add(place, found)
    except OSError as error:
        _tell_unwritable(error)


def _announced(device: str, kernels: Mapping[str, Sequence[str]], deadline: float) -> Verdicts:
    _LOG.warning(
        "checking the kernels of %s on %s before their first use, once: at most %.0f s (RTSVM_SELFCHECK=off skips the "
        "checks and the kernels)",
        f"{len(kernels)} ops" if len(kernels) > 1 else next(iter(kernels)), store.name_of(device), BUDGET,
    )  # fmt: skip
    return children.run_checks(device, kernels, deadline)


def _tell_failures(device: str, kernels: Mapping[str, Sequence[str]]) -> None:
    """Warn once of each kernel that is not used because of its check."""
    for op, names in kernels.items():
        for backend in names:
            verdict = _of(device).get(op, {}).get(backend)
            if verdict is not None and not verdict.passed and (device, op, backend) not in _told:
                _told.add((device, op, backend))
                _LOG.warning(
                    "%s: the %s kernel is not used on %s: %s; `rtsvm selfcheck --device %s` checks again and prints "
                    "what to report",
                    op, backend, store.name_of(device), verdict.reason, device,
                )  # fmt: skip


def _tell_unwritable(error: OSError) -> None:
    if ("cache",) not in _told:
        _told.add(("cache",))
        _LOG.warning(
            "%s cannot be used (%s), so every process checks kernels again; set RTSVM_CACHE to a folder that can be "
            "written",
            store.cache_folder(), error.strerror or error,
        )  # fmt: skip
