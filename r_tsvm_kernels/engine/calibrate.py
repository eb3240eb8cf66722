"""Estimate the time of a merge from samples measured on this machine."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..blocks import WHOLE, Blocks
from ..errors import CheckpointError
from ..files import open_regular
from ..linalg import Factored
from ..merge import merge_tensors
from ..plan import MergePlan, matrix_cost, tensor_cost
from ..system import forget_pages

SAMPLE_BYTES = 128 << 20
SAMPLE_ELEMENTS = 1 << 21
SAMPLE_SIDE = 768


@dataclass(frozen=True)
class TimeEstimate:
    """Estimated seconds of a merge on an idle machine.

    Attributes:
        reading: for all inputs.
        computing: for all tensors, divided by the number of workers.
        writing: for the output, at the rate of reading.
    """

    reading: float
    computing: float
    writing: float

    @property
    def total(self) -> float:
        """Wall time: reading and writing share a disk, computing overlaps with both."""
        return max(self.reading + self.writing, self.computing)


def estimate_time(plan: MergePlan, workers: int, device: torch.device) -> TimeEstimate:
    """Estimate the time of a merge: read part of one input and merge random samples of each kind of work.

    This takes a few seconds. The estimate is right within a factor of about two: disks cache what was read lately, and
    decompositions do not scale exactly like matrix products.

    Args:
        plan: the plan of the merge.
        workers: number of merging threads.
        device: the device that merges.

    Raises:
        CheckpointError: the input cannot be read.
    """
    files = plan.input_files()
    rate = _read_rate(max(files, key=lambda file: file.bytes_read).path)
    merging = [name for name, tensor in plan.tensors.items() if tensor.treatment.kind != "base"]
    together = [name for name in merging if not plan.row_wise(name) or plan.tensors[name].merged_apart.divide]
    apart = [name for name in merging if name not in set(together)]
    seconds = 0.0
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as every worker of an engine
    try:
        if apart:
            elements = sum(plan.tensors[name].elements for name in apart)
            seconds += elements / SAMPLE_ELEMENTS * _sample(plan, apart, (SAMPLE_ELEMENTS // 1024, 1024), device)
        if together:
            shape = (SAMPLE_SIDE, SAMPLE_SIDE)
            largest = max(together, key=lambda name: tensor_cost(plan, name).flops)
            flops = sum(tensor_cost(plan, name).flops for name in together)
            seconds += flops / matrix_cost(plan, largest, shape).flops * _sample(plan, [largest], shape, device)
    finally:
        torch.set_num_threads(threads)
    return TimeEstimate(plan.bytes_read / rate, seconds / workers, plan.bytes_written / rate)


def _sample(plan: MergePlan, names: Sequence[str], shape: tuple[int, int], device: torch.device) -> float:
    """Return the seconds, the better of two, to merge random tensors of `shape` treated like the first of `names`."""
    plan, tensor = plan.section(names[0]), plan.tensors[names[0]]
    generator = torch.Generator("cpu").manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device="cpu")

    base = draw(*shape).to(tensor.dtypes[0]).to(device)
    tuned: list[Tensor | Factored] = []
    for rank in plan.update_ranks(tensor.name) if plan.keeps_factors(tensor.name) else [None] * len(plan.tuned):
        if rank is None:
            tuned.append((base + 0.01 * draw(*shape).to(device)).to(base.dtype))
        else:
            tuned.append(Factored(draw(shape[0], rank), draw(rank, shape[1]), 0.01).to(device))
    # The sample is one matrix; for a mean, its rows are taken as vectors.
    blocks = WHOLE if tensor.treatment.kind == "merge" else Blocks(packed=True)
    times = []
    for _ in range(2):
        start = time.perf_counter()
        result = merge_tensors(base, tuned, plan.config, name=tensor.name, position=tensor.position, blocks=blocks)
        result.weight.cpu()
        times.append(time.perf_counter() - start)
    return min(times)


def _read_rate(file: Path) -> float:
    """Return the bytes per second of reading the start of a file, from disk if the system drops its cached pages."""
    buffer = bytearray(8 << 20)
    try:
        with open_regular(file) as opened:
            forget_pages(opened.fileno(), SAMPLE_BYTES)
            start, done = time.perf_counter(), 0
            while done < SAMPLE_BYTES and (count := opened.readinto(buffer)):
                done += count
            return max(done, 1) / (time.perf_counter() - start)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror or error}") from error
