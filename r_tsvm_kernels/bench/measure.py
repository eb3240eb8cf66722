"""Time, memory and error of calls."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

FLUSH_BYTES = 256 << 20  # more than the second-level cache of any GPU
SHORTEST_SAMPLE = 2e-3  # seconds; shorter calls are repeated within a sample
MOST_ROUNDS = 15
HEAD_START = 20_000_000  # cycles of a GPU, about 10 ms: in that time the host queues some hundred launches
LONGEST = 120.0  # seconds for all rounds of a case

Call = Callable[[], Any]


class Stopwatch:
    """Times calls on one device: by the clock on a CPU; by events, with caches flushed before, on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._flushed = torch.empty(FLUSH_BYTES if device.type == "cuda" else 0, dtype=torch.uint8, device=device)

    def seconds(self, call: Call, repeats: int = 1) -> float:
        """Return the seconds of one call, the mean of `repeats` on a CPU; freeing the result is not part of it."""
        if self.device.type == "cuda":
            return self._device_seconds(call)
        start = time.perf_counter()
        for _ in range(repeats):
            result = call()
        elapsed = time.perf_counter() - start
        del result
        return elapsed / repeats

    def _device_seconds(self, call: Call) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        self._flushed.zero_()
        torch.cuda._sleep(HEAD_START)  # type: ignore[no-untyped-call]  # launches of the host are not to be timed
        start.record()
        result = call()
        end.record()
        torch.cuda.synchronize()
        del result
        return float(start.elapsed_time(end)) / 1e3


def interleaved(
    calls: Mapping[str, Call],
    rounds: int,
    stopwatch: Stopwatch | None = None,
    repeats: Mapping[str, int] | None = None,
) -> dict[str, list[float]]:
    """Time the calls in turn, round by round, so that other load on the machine affects all of them equally.

    Args:
        calls: by name; the caller has run each once already.
        rounds: number of rounds; every call runs in each of them.
        stopwatch: by default one of the CPU.
        repeats: calls per sample by name; 1 by default.

    Returns:
        Seconds by name, one per round.
    """
    stopwatch = stopwatch or Stopwatch(torch.device("cpu"))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(stopwatch.seconds(call, (repeats or {}).get(name, 1)))
    return times


def plan_rounds(seconds: Mapping[str, float], budget: float, least: int) -> tuple[int, dict[str, int]]:
    """Return the number of rounds, the same for all calls, and the calls per sample of each.

    Args:
        seconds: of one call, by name.
        budget: seconds per call to be measured, on average.
        least: number of rounds, unless they would take more than `LONGEST` seconds.
    """
    repeats = {name: max(1, round(SHORTEST_SAMPLE / max(value, 1e-9))) for name, value in seconds.items()}
    one_round = sum(repeats[name] * value for name, value in seconds.items()) + 1e-9
    rounds = min(MOST_ROUNDS, max(least, int(budget * len(seconds) / one_round)))
    return max(1, min(rounds, int(LONGEST / one_round))), repeats


def peak_of(call: Callable[[], T]) -> tuple[T, int]:
    """Return the result of a call and the largest growth of resident memory during it, in bytes (Linux)."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forget the peak so far
    before = resident("self", "VmRSS")
    result = call()
    return result, max(0, resident("self", "VmHWM") - before)


def resident(process: str, field: str) -> int:
    """Return a field of the memory status of a process in bytes; 0 if it has ended."""
    try:
        status = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith(field)), 0)


def peak_extra_bytes(call: Call, device: torch.device) -> tuple[Any, int | None]:
    """Return the result of a call and its peak memory without inputs and result.

    On a CPU that is resident memory, to within a megabyte or two; None where the system does not report it.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = call()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
    else:
        _return_free_memory()
        try:
            result, peak = peak_of(call)
        except OSError:
            return call(), None
    return result, max(0, peak - sum(leaf.nbytes for leaf in leaves(result)))


def _return_free_memory() -> None:
    """Return freed memory to the system, because a call that reuses it would seem to need none."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def leaves(result: Any) -> list[Tensor]:
    """Return the tensors in a result, whatever its type."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, list | tuple):
        return [leaf for part in result for leaf in leaves(part)]
    return [leaf for part in vars(result).values() for leaf in leaves(part)] if hasattr(result, "__dict__") else []


def worst_error(found: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """Return the largest error of a tensor relative to its true value (Frobenius); integers must be equal.

    Infinity if numbers, shapes or integers differ, or if a value is NaN.
    """
    if len(found) != len(truth):
        return float("inf")
    return max((_error(x, y) for x, y in zip(found, truth, strict=True)), default=0.0)


def _error(found: Tensor, truth: Tensor) -> float:
    if found.shape != truth.shape or found.is_floating_point() != truth.is_floating_point():
        return float("inf")
    if not truth.is_floating_point():
        return 0.0 if bool((found == truth.to(found.device)).all()) else float("inf")
    exact = truth.double()
    same = found.double() == exact  # infinities, too
    distance = torch.where(same, 0.0, found.double() - exact).norm()
    error = float(distance / exact.norm()) if bool(distance > 0) else float(distance)
    return error if error == error else float("inf")
