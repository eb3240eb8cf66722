"""Fit a plan into a memory budget: number of workers, row tiles, and how many bytes may be in memory at a time.

Results never depend on the schedule. Only tensors whose rows can be merged separately with the same bits are cut into
tiles. The working memory of a decomposition changes its rounding, and so do the other matrices of its batch. Therefore
both depend on the recipe and the shapes alone, and a budget that is too small for them is refused.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from ..errors import ConfigError, MemoryBudgetError
from ..plan import MergePlan, batches, footprint, rows_at_a_time
from ..sizes import format_size
from ..text import some

_LOG = logging.getLogger(__name__)

# Python, torch and this package; and for each worker its stack, BLAS buffers and memory that malloc retains: measured,
# rounded up. How much of torch's libraries is mapped differs between copies of the same files: merges of a few bytes
# take 249 to 302 MB. Where Python keeps no bytecode, it compiles torch in each process, which takes about 60 MB more.
PROGRAM_BYTES, WORKER_BYTES = 320 << 20, 32 << 20
# Reading three tokenizers of 128,000 tokens took 98 MB above the rest of the program: 270 bytes for each token.
TOKEN_BYTES = 320

# GPU memory beside tensors: the context, with the code of kernels, which torch does not see; and for each worker the
# workspaces of cuBLAS (32 MiB a stream on Hopper, and as much for recording graphs), cuBLASLt and cuSOLVER. From the
# documentation of CUDA, rounded up: nothing was measured.
CONTEXT_BYTES, LIBRARY_BYTES = 640 << 20, 128 << 20

# Limit of the memory of CUDA graphs of a worker, where the budget has room for it.
GRAPH_BYTES = 2 << 30

# Elements of a row tile. Each tile takes a millisecond of Python: half as large ones took 6 % more processor time.
# Twice as large ones took 80 MB more, because malloc retains a multiple of them; a GPU needs more. Smaller tiles save
# little: a merge by single rows took 7 times as long, for 0.2 % less memory.
TILE_ELEMENTS = (1 << 21, 1 << 20, 1 << 18, 1 << 16)
GPU_FACTOR = 8


@dataclass(frozen=True)
class TensorSchedule:
    """Tiles of one tensor, and the memory of one tile.

    Attributes:
        rows: size of the leading dimension.
        tile_rows: rows merged at a time; all rows unless they can be merged separately.
        inputs: bytes of the inputs of a tile.
        work: upper bound of the bytes in use beside the inputs while a tile is merged, output included.
        output: bytes of the merged tile, which are in use until it is written.
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
        """First and last (exclusive) row of each tile, in order; one empty tile if there are no rows."""
        firsts = [index * self.tile_rows for index in range(self.count)]
        return [(first, min(first + self.tile_rows, self.rows)) for first in firsts]


def reserved_for(nbytes: int) -> int:
    """Return the bytes that torch reserves for tensors of so many bytes: an eighth more, for what lies between them."""
    return nbytes + (nbytes >> 3)


def together(tensors: Sequence[TensorSchedule]) -> TensorSchedule:
    """Return the memory of several tensors that are merged together, as if they were one with a single tile."""
    rows = sum(tensor.rows for tensor in tensors)
    return TensorSchedule(
        rows, rows, *(sum(getattr(t, name) for t in tensors) for name in ("inputs", "work", "output"))
    )


@dataclass(frozen=True)
class Schedule:
    """How an engine carries out a plan: workers, tiles and memory limits.

    Groups of tensors start in their order, and tiles in that of their tensor. The tensors of a group with several are
    single tiles that are read and merged together: what follows holds for their sums. Reading a tile starts when its
    `inputs` and those of all tiles that are not merged yet fit into `read_bytes`. Merging it starts when its `work`,
    that of all tiles being merged and the `output` of all tiles waiting to be written fit into `work_bytes`. On a GPU,
    inputs and work count against `device_bytes`, and only the output counts against `work_bytes`.

    Attributes:
        workers: number of merging threads.
        read_bytes: limit of the bytes of inputs in host memory.
        work_bytes: limit of the other bytes of tensors in host memory.
        device_bytes: limit of the bytes of tensors on the GPU; 0 without one.
        device_program_bytes: GPU memory of everything else; 0 without a GPU.
        device_limit: limit of the GPU memory of the process, in bytes; None without one.
        tensors: by name, in the order of the plan.
        groups: names of tensors that are merged together, see `plan.batches`.
        program_bytes: bytes of everything else.
        graph_bytes: limit of the GPU memory of CUDA graphs, in what the tensors leave of the budget.
    """

    workers: int
    read_bytes: int
    work_bytes: int
    device_bytes: int
    tensors: dict[str, TensorSchedule]
    groups: list[tuple[str, ...]]
    program_bytes: int
    device_program_bytes: int = 0
    graph_bytes: int = 0
    device_limit: int | None = None

    def needs(self, group: Sequence[str]) -> TensorSchedule:
        """Return the memory of a tile of a tensor, or of all tensors of a group with several, as one tile."""
        if len(group) == 1:
            return self.tensors[group[0]]
        return together([self.tensors[name] for name in group])

    @property
    def peak_host_bytes(self) -> int:
        """Upper bound of the memory of the whole process."""
        return self.program_bytes + self.read_bytes + self.work_bytes

    @property
    def peak_device_bytes(self) -> int:
        """Upper bound of the GPU memory of the process, as the driver counts it, without CUDA graphs."""
        return self.device_program_bytes + reserved_for(self.device_bytes)


def make_schedule(
    plan: MergePlan,
    workers: int,
    memory: int | None = None,
    device_memory: int | None = None,
    *,
    on_gpu: bool = False,
) -> Schedule:
    """Choose workers, row tiles and limits so that the estimated peak stays within the budgets.

    The choice has as many workers as fit, then the largest tiles. The inputs of one more tile are read ahead unless
    only the smallest schedules fit.

    Args:
        plan: the merge.
        workers: largest number of merging threads.
        memory: budget of the whole process in host memory, in bytes; None means no limit.
        device_memory: budget of the process on the GPU, in bytes; None means no limit.
        on_gpu: whether tensors are merged on a GPU.

    Returns:
        The first schedule that fits.

    Raises:
        ConfigError: fewer than one worker.
        MemoryBudgetError: one worker with the smallest tiles does not fit; the message names the smallest budget.
    """
    if workers < 1:
        raise ConfigError(f"a merge needs at least one worker, got {workers}")
    for candidate in _candidates(plan, workers, on_gpu):
        if _fits(candidate.peak_host_bytes, memory) and _fits(candidate.peak_device_bytes, device_memory):
            _LOG.info(
                "%d of %d threads, tiles of at most %d rows, at most %s of memory",
                *(candidate.workers, workers, max((t.tile_rows for t in candidate.tensors.values()), default=0)),
                format_size(candidate.peak_host_bytes),
            )
            wanted = candidate.workers * GRAPH_BYTES if on_gpu else 0
            spare = wanted if device_memory is None else device_memory - candidate.peak_device_bytes
            return replace(candidate, graph_bytes=min(wanted, spare), device_limit=device_memory if on_gpu else None)
    raise _too_small(plan, candidate, memory, device_memory)


def smallest_schedule(plan: MergePlan, on_gpu: bool = False) -> Schedule:
    """Return the schedule that needs the least memory: one worker, the smallest tiles, nothing read ahead."""
    tensors = _tensor_schedules(plan, TILE_ELEMENTS[-1], on_gpu)
    return _limited(plan, tensors, batches(plan, _device_type(on_gpu)), 1, 0, on_gpu)


def _candidates(plan: MergePlan, workers: int, on_gpu: bool) -> Iterator[Schedule]:
    """Yield schedules, the best first and the smallest last."""
    factor = GPU_FACTOR if on_gpu else 1
    tiled = [_tensor_schedules(plan, factor * elements, on_gpu) for elements in TILE_ELEMENTS]
    groups = batches(plan, _device_type(on_gpu))
    for count in range(workers, 0, -1):
        for tensors in tiled:
            yield _limited(plan, tensors, groups, count, 1, on_gpu)
    yield smallest_schedule(plan, on_gpu)


def _device_type(on_gpu: bool) -> str:
    return "cuda" if on_gpu else "cpu"


def _tensor_schedules(plan: MergePlan, elements: int, on_gpu: bool) -> dict[str, TensorSchedule]:
    """Cut tensors into tiles of about so many elements and at least one row, if their rows are merged separately."""
    found = {}
    for name, tensor in plan.tensors.items():
        rows = tile_rows = tensor.rows
        if plan.row_wise(name) and tensor.spec.shape:
            tile_rows = min(rows, elements // max(1, math.prod(tensor.spec.shape[1:])))
            together = rows_at_a_time(plan, name, _device_type(on_gpu))
            tile_rows = max(tile_rows // together, 1) * together
        tile_rows = max(1, tile_rows)
        needs = footprint(plan, name, tile_rows, _device_type(on_gpu))
        found[name] = TensorSchedule(rows, tile_rows, needs.inputs, needs.work, needs.output)
    return found


def _limited(
    plan: MergePlan,
    tensors: dict[str, TensorSchedule],
    groups: list[tuple[str, ...]],
    workers: int,
    ahead: int,
    on_gpu: bool,
) -> Schedule:
    """Return a schedule whose limits admit as many successive tiles as workers, and the inputs of `ahead` more."""
    values = [together([tensors[name] for name in group]) if len(group) > 1 else tensors[group[0]] for group in groups]
    inputs = _largest_run([(t.inputs, t.count) for t in values], workers + ahead)
    work = _largest_run([(t.output if on_gpu else t.work, t.count) for t in values], workers)
    device = _largest_run([(t.inputs + t.work, t.count) for t in values], workers) if on_gpu else 0
    program = PROGRAM_BYTES + workers * WORKER_BYTES
    program += 0 if plan.vocabulary is None else TOKEN_BYTES * plan.vocabulary.tokens_read
    own = CONTEXT_BYTES + workers * LIBRARY_BYTES if on_gpu else 0
    return Schedule(workers, inputs, work, device, tensors, groups, program, own)


def _largest_run(sizes: Sequence[tuple[int, int]], length: int) -> int:
    """Return the largest sum of `length` neighbours among sizes, each repeated by its count."""
    repeated = [size for size, count in sizes for _ in range(min(count, length))]
    sums = [0, *accumulate(repeated)]
    return max(end - start for start, end in zip(sums, sums[min(length, len(repeated)) :], strict=False))


def _fits(peak: int, budget: int | None) -> bool:
    return budget is None or peak <= budget


def _too_small(plan: MergePlan, smallest: Schedule, memory: int | None, device_memory: int | None) -> MemoryBudgetError:
    """Make the error that says how much the smallest schedule needs, for what, and what helps."""
    program = smallest.program_bytes
    group = max(smallest.groups, key=lambda names: smallest.needs(names).inputs + smallest.needs(names).work)
    largest = some(group)
    refused = []
    if memory is not None and memory < (peak := smallest.peak_host_bytes):
        refused.append(
            f"this merge needs a memory budget of at least {format_size(peak)} ({peak} bytes), got "
            f"{format_size(memory)}: {format_size(program)} for Python, torch and one thread, "
            f"{format_size(peak - program)} for tensors, above all {largest}"
        )
    if device_memory is not None and device_memory < (peak := smallest.peak_device_bytes):
        refused.append(
            f"this merge needs a device memory budget of at least {format_size(peak)} ({peak} bytes), got "
            f"{format_size(device_memory)}: {format_size(smallest.device_program_bytes)} for the CUDA context and "
            f"libraries, {format_size(peak - smallest.device_program_bytes)} for tensors, above all {largest}"
        )
    if memory is not None and memory <= program:
        advice = "no recipe fits this budget, raise it"
    elif plan.row_wise(group[0]):
        advice = f"the tiles of {largest} are the smallest already: raise the budget, or exclude the tensor"
    elif "workspace" in plan.config.method.parameters.model_fields:
        advice = f"raise the budget, set a smaller `workspace` in the recipe, or exclude {largest}"
    else:
        advice = f"raise the budget, or exclude {largest}, whose rows cannot be merged separately"
    return MemoryBudgetError(f"{'; '.join(refused)}; {advice}")
