"""Task statistics in Triton: two passes over the tensors; torch merges the few numbers between them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._checks import accumulation_dtype
from .._triton import LAUNCH, REAL, block_offsets, device_of, flat, load
from . import TaskStatistics, reference

BLOCK = 2048
OPTIONS = {**LAUNCH, "num_warps": 16}  # with 8, many tasks at once do not fit into the registers


@triton.jit
def moments_kernel(base_ptr, tuned_ptrs, parts_ptr, numel, REAL: tl.constexpr, BLOCK: tl.constexpr):
    """Of ``a = |tuned - base|`` in one block: ``sum(a)``, ``sum((a - mean(a))^2)``, ``max(a)``, count of ``a = 0``.

    For each of the tasks; `parts_ptr` is (tasks, 4, blocks).
    """
    block = tl.program_id(0)
    blocks = tl.num_programs(0).to(tl.int64)
    offsets, inside = block_offsets(block, numel, BLOCK)
    start = load(base_ptr, offsets, inside, REAL)
    part_ptr = parts_ptr + block
    for t in tl.static_range(len(tuned_ptrs)):
        a = tl.abs(load(tuned_ptrs[t], offsets, inside, REAL) - start).to(tl.float64)  # (BLOCK,)
        total = tl.sum(a, axis=0)
        mean = total / tl.sum(inside.to(tl.int32), axis=0)
        deviation = tl.where(inside, a - mean, 0.0)
        zeros = (a == 0) & inside
        tl.store(part_ptr, total)
        tl.store(part_ptr + blocks, tl.sum(deviation * deviation, axis=0))
        tl.store(part_ptr + 2 * blocks, tl.max(a, axis=0))
        tl.store(part_ptr + 3 * blocks, tl.sum(zeros.to(tl.int32), axis=0).to(tl.float64))
        part_ptr += 4 * blocks


@triton.jit
def tail_kernel(
    base_ptr, tuned_ptrs, theta_ptr, small_limit_ptr, parts_ptr, numel, REAL: tl.constexpr, BLOCK: tl.constexpr
):
    """Of ``a = |tuned - base|`` in one block: ``sum(a[a > theta])`` and the count of ``a <= small_limit``.

    For each of the tasks; `parts_ptr` is (tasks, 2, blocks).
    """
    block = tl.program_id(0)
    blocks = tl.num_programs(0).to(tl.int64)
    offsets, inside = block_offsets(block, numel, BLOCK)
    start = load(base_ptr, offsets, inside, REAL)
    part_ptr = parts_ptr + block
    for t in tl.static_range(len(tuned_ptrs)):
        a = tl.abs(load(tuned_ptrs[t], offsets, inside, REAL) - start).to(tl.float64)  # (BLOCK,)
        outliers = tl.where(a > tl.load(theta_ptr + t), a, 0.0)
        small = (a <= tl.load(small_limit_ptr + t)) & inside
        tl.store(part_ptr, tl.sum(outliers, axis=0))
        tl.store(part_ptr + blocks, tl.sum(small.to(tl.int32), axis=0).to(tl.float64))
        part_ptr += 2 * blocks


def run(base: Tensor, tuned: Sequence[Tensor], sigma: float, eps: float) -> TaskStatistics:
    """See `task_statistics`. Deterministic; never waits for the device. The base and each task are read twice."""
    numel, blocks = base.numel(), triton.cdiv(base.numel(), BLOCK)
    if numel == 0:
        return reference.run(base, tuned, sigma, eps)
    real = REAL[accumulation_dtype(base, *tuned)]
    origin, tensors = flat(base), tuple(flat(tensor) for tensor in tuned)
    # Counts are kept as float64 too, which holds them exactly.
    moments = torch.empty((len(tuned), 4, blocks), dtype=torch.float64, device=base.device)
    tails = torch.empty((len(tuned), 2, blocks), dtype=torch.float64, device=base.device)
    with device_of(base):
        moments_kernel[(blocks,)](origin, tensors, moments, numel, real, BLOCK, **OPTIONS)
        total, mean, sd, largest, zeros = _merge(moments, numel)
        theta = torch.full_like(mean, math.inf) if math.isinf(sigma) else mean + sigma * sd
        small_limit = eps * mean
        tail_kernel[(blocks,)](origin, tensors, theta, small_limit, tails, numel, real, BLOCK, **OPTIONS)
    outlier_sum, small = tails.sum(-1).unbind(1)
    outlier_mass = torch.where(total > 0, outlier_sum / total, total)
    return TaskStatistics(numel, mean, sd, largest, zeros.long(), theta, outlier_mass, small.long())


def _merge(moments: Tensor, numel: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return sum, mean, sd, max and zeros of each task from those of its blocks, (tasks, 4, blocks)."""
    sums, squares, largest, zeros = moments.unbind(1)  # (tasks, blocks) each
    counts = torch.full_like(sums[0], BLOCK)
    counts[-1] = numel - (counts.numel() - 1) * BLOCK
    total = sums.sum(-1)
    mean = total / numel
    # Chan, Golub, LeVeque 1979: deviations within the blocks, and of the blocks' means.
    between = counts * (sums / counts - mean[:, None]).square()
    sd = ((squares.sum(-1) + between.sum(-1)) / numel).sqrt()
    # Whether a maximum over elements keeps NaN differs by target; the sum always does.
    maximum = torch.where(total.isnan(), total, largest.amax(-1))
    # Deviations from an infinite mean: inf for finite magnitudes (the sum overflowed), NaN for infinite ones.
    overflowed = torch.where(maximum.isfinite(), math.inf, math.nan).to(sd)
    return total, mean, torch.where(mean.isfinite(), sd, overflowed), maximum, zeros.sum(-1)
