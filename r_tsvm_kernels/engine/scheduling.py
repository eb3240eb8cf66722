"""How a plan is worked through in a given memory: workers, row tiles, and how much may be in memory at one time.

What is computed never depends on it. Only tensors whose rows may be merged apart to the bit are cut into tiles; the
working memory of a decomposition changes its rounding, so it follows from the recipe and the shape alone, and a budget
that is too small for it is refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from ..errors import ConfigError, MemoryBudgetError
from ..plan import MergePlan, footprint
from ..sizes import format_size

# Python, torch and this package; and for each worker its stack, buffers of BLAS and what malloc holds back: measured,
# rounded up.
PROGRAM_BYTES, WORKER_BYTES = 288 << 20, 32 << 20

# Elements of a row tile. Larger ones were no faster on a CPU, and malloc keeps a multiple of them; a GPU wants more.
TILE_ELEMENTS = (1 << 20, 1 << 18, 1 << 16)
GPU_FACTOR = 16


@dataclass(frozen=True)
class TensorSchedule:
    """How one tensor is worked through.

    Attributes:
        rows: size of its leading dimension.
        tile_rows: rows merged at a time; all of them unless they may be merged apart.
        inputs: bytes of the inputs of a tile.
        work: upper bound of the bytes in use beside the inputs while a tile is merged; its output is part of it.
        output: bytes of the merged tile, which stay in use until it is written.
    """

    rows: int
    tile_rows: int
    inputs: int
    work: int
    output: int

    @property
    def count(self) -> int:
        """Number of tiles."""
        return max(1, -(-self.rows // self.tile_rows))

    @property
    def tiles(self) -> list[tuple[int, int]]:
        """First and last (exclusive) row of every tile, in order; one empty tile if there are no rows."""
        firsts = [index * self.tile_rows for index in range(self.count)]
        return [(first, min(first + self.tile_rows, self.rows)) for first in firsts]


@dataclass(frozen=True)
class Schedule:
    """How a plan is worked through, and in how much memory.

    Whoever follows it starts to read a tile when its `inputs` fit into `read_bytes` with those of all tiles that are
    not merged yet, and to merge it when its `work` fits into `work_bytes` with that of all tiles being merged and the
    `output` of all that wait to be written. Tiles start in the order of the plan. On a GPU `device_bytes` holds inputs
    and work together, and of the host's `work_bytes` only the output is needed.

    Attributes:
        workers: threads that merge.
        read_bytes: most bytes of inputs in host memory.
        work_bytes: most bytes in host memory beside them.
        device_bytes: most bytes of tensors on the GPU; 0 without one.
        tensors: by name, in the order of the plan.
    """

    workers: int
    read_bytes: int
    work_bytes: int
    device_bytes: int
    tensors: dict[str, TensorSchedule]

    @property
    def peak_host_bytes(self) -> int:
        """Upper bound of the memory of the whole process."""
        return PROGRAM_BYTES + self.workers * WORKER_BYTES + self.read_bytes + self.work_bytes

    @property
    def peak_device_bytes(self) -> int:
        """Upper bound of the GPU memory of all tensors."""
        return self.device_bytes


def make_schedule(
    plan: MergePlan,
    workers: int,
    memory: int | None = None,
    device_memory: int | None = None,
    *,
    on_gpu: bool = False,
) -> Schedule:
    """Choose workers, row tiles and limits so that the estimated peak stays within the budgets.

    The most workers that fit are taken, with the largest tiles and, before anything else is given up, with the inputs
    of one more tile read ahead.

    Args:
        plan: the merge.
        workers: most threads that merge.
        memory: budget of the whole process in host memory, in bytes; None takes what the workers need.
        device_memory: budget of tensors on the GPU, in bytes; None takes what the workers need.
        on_gpu: whether tensors are merged on a GPU.

    Raises:
        ConfigError: fewer than one worker.
        MemoryBudgetError: not even one worker with the smallest tiles fits; the message names the smallest budget
            that works.
    """
    if workers < 1:
        raise ConfigError(f"a merge needs at least one worker, got {workers}")
    for candidate in _candidates(plan, workers, on_gpu):
        if _fits(candidate.peak_host_bytes, memory) and _fits(candidate.peak_device_bytes, device_memory):
            return candidate
    raise _too_small(plan, candidate, memory, device_memory)


def smallest_schedule(plan: MergePlan, on_gpu: bool = False) -> Schedule:
    """Return the schedule that needs the least memory: one worker, tiles of one row, nothing read ahead."""
    return _limited(_tensor_schedules(plan, 1, on_gpu), 1, 0, on_gpu)


def _candidates(plan: MergePlan, workers: int, on_gpu: bool) -> Iterator[Schedule]:
    """Yield schedules, the most desirable first and the smallest last."""
    factor = GPU_FACTOR if on_gpu else 1
    tiled = [_tensor_schedules(plan, factor * elements, on_gpu) for elements in TILE_ELEMENTS]
    for count in range(workers, 0, -1):
        for tensors in tiled:
            yield _limited(tensors, count, 1, on_gpu)
    yield _limited(tiled[-1], 1, 0, on_gpu)
    yield smallest_schedule(plan, on_gpu)


def _tensor_schedules(plan: MergePlan, elements: int, on_gpu: bool) -> dict[str, TensorSchedule]:
    """Cut what may be cut into tiles of about so many elements, at least a row."""
    found = {}
    for name, tensor in plan.tensors.items():
        rows = tile_rows = tensor.rows
        if plan.row_wise(name) and tensor.spec.shape:
            tile_rows = min(rows, elements // max(1, math.prod(tensor.spec.shape[1:])))
        tile_rows = max(1, tile_rows)
        needs = footprint(plan, name, tile_rows, "cuda" if on_gpu else "cpu")
        found[name] = TensorSchedule(rows, tile_rows, needs.inputs, needs.work, needs.output)
    return found


def _limited(tensors: dict[str, TensorSchedule], workers: int, ahead: int, on_gpu: bool) -> Schedule:
    """Allow what so many tiles in a row need: as many as there are workers, and inputs of some read ahead."""
    values = list(tensors.values())
    inputs = _largest_run([(t.inputs, t.count) for t in values], workers + ahead)
    work = _largest_run([(t.output if on_gpu else t.work, t.count) for t in values], workers)
    device = _largest_run([(t.inputs + t.work, t.count) for t in values], workers) if on_gpu else 0
    return Schedule(workers, inputs, work, device, tensors)


def _largest_run(sizes: Sequence[tuple[int, int]], length: int) -> int:
    """Return the largest sum of `length` neighbours among sizes that are each repeated so many times."""
    repeated = [size for size, count in sizes for _ in range(min(count, length))]
    sums = [0, *accumulate(repeated)]
    return max(end - start for start, end in zip(sums, sums[min(length, len(repeated)) :], strict=False))


def _fits(peak: int, budget: int | None) -> bool:
    return budget is None or peak <= budget


def _too_small(plan: MergePlan, smallest: Schedule, memory: int | None, device_memory: int | None) -> MemoryBudgetError:
    """Say what the smallest schedule takes, of what that is the sum, and what would help."""
    program = PROGRAM_BYTES + smallest.workers * WORKER_BYTES
    largest = max(smallest.tensors, key=lambda name: smallest.tensors[name].inputs + smallest.tensors[name].work)
    refused = []
    if memory is not None and memory < (peak := smallest.peak_host_bytes):
        refused.append(
            f"this merge needs a memory budget of at least {format_size(peak)} ({peak} bytes), got "
            f"{format_size(memory)}: {format_size(program)} for Python, torch and one thread, "
            f"{format_size(peak - program)} for tensors, above all {largest}"
        )
    if device_memory is not None and device_memory < (peak := smallest.peak_device_bytes):
        refused.append(
            f"this merge needs a device memory budget of at least {format_size(peak)} ({peak} bytes) for tensors, "
            f"above all {largest}, got {format_size(device_memory)}"
        )
    if memory is not None and memory <= program:
        advice = "no recipe fits this budget, raise it"
    elif plan.row_wise(largest):
        advice = f"rows of {largest} are merged one at a time already: raise the budget, or exclude the tensor"
    elif "workspace" in plan.config.method.parameters.model_fields:
        advice = f"raise the budget, set a smaller `workspace` in the recipe, or exclude {largest}"
    else:
        advice = f"raise the budget, or exclude {largest}, whose rows cannot be merged apart"
    return MemoryBudgetError(f"{'; '.join(refused)}; {advice}")
