"""Outlier clipping and magnitude pruning in Triton: the task vector is formed anew in each pass, stored once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._checks import accumulation_dtype, raise_not_finite
from .._triton import LAUNCH, REAL, block_offsets, device_of, flat, load_delta, selected, ties_in_block
from ..magnitude_select.triton_kernel import kth_magnitude
from ..task_statistics import TaskStatistics

BLOCK = 2048


@triton.jit
def tie_kernel(
    base_ptr, tuned_ptr, theta_ptr, threshold_ptr, ties_in_ptr, numel, REAL: tl.constexpr, BLOCK: tl.constexpr
):
    """``ties_in[b] = #{i in block b: |d_i| = threshold}`` with ``d = clamp(tuned - base, -theta, theta)``."""
    block = tl.program_id(0)
    offsets, inside = block_offsets(block, numel, BLOCK)
    delta = load_delta(base_ptr, tuned_ptr, theta_ptr, offsets, inside, REAL)
    tl.store(ties_in_ptr + block, ties_in_block(tl.abs(delta), inside, threshold_ptr))


@triton.jit
def prune_kernel(
    base_ptr, tuned_ptr, theta_ptr, threshold_ptr, ties_ptr, ties_before_ptr, out_ptr, numel,
    REAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``out_i = d_i`` where ``|d_i| > threshold``, or it is equal and one of the first `ties` that are; 0 elsewhere.

    ``d = clamp(tuned - base, -theta, theta)``; without `threshold_ptr` all of d stays.
    """
    block = tl.program_id(0)
    offsets, inside = block_offsets(block, numel, BLOCK)
    delta = load_delta(base_ptr, tuned_ptr, theta_ptr, offsets, inside, REAL)  # (BLOCK,)
    if threshold_ptr is not None:
        survives = selected(tl.abs(delta), inside, threshold_ptr, ties_ptr, ties_before_ptr + block)
        delta = tl.where(survives, delta, 0.0)
    tl.store(out_ptr + offsets, delta, mask=inside)


def run(
    base: Tensor, tuned: Sequence[Tensor], statistics: TaskStatistics, outlier_weighting: str, keep: Sequence[int]
) -> list[Tensor]:
    """See `reweight_prune`. Waits for the device once for each task that is pruned: to refuse NaN and infinity."""
    dtype = accumulation_dtype(base, *tuned)
    origin = flat(base)
    pruned = []
    with device_of(base):
        for task, (weight, count) in enumerate(zip(tuned, keep, strict=True)):
            theta = statistics.theta[task] if outlier_weighting == "clip" else None
            pruned.append(_prune(origin, flat(weight), theta, count, dtype))
    return pruned


def _prune(base: Tensor, tuned: Tensor, theta: Tensor | None, keep: int, dtype: torch.dtype) -> Tensor:
    out = torch.empty(base.shape, dtype=dtype, device=base.device)
    numel, real, grid = base.numel(), REAL[dtype], (triton.cdiv(base.numel(), BLOCK),)
    if numel == 0:
        return out
    threshold = ties = ties_before = None
    if keep < numel:
        selection, bad = kth_magnitude(tuned, max(keep, 1), dtype, base, theta)
        if bad:
            raise_not_finite("reweight_prune", int(bad), numel)
        if keep == 0:
            return out.zero_()
        threshold, ties = selection.threshold, selection.ties
        ties_in = torch.empty(grid, dtype=torch.int64, device=base.device)
        tie_kernel[grid](base, tuned, theta, threshold, ties_in, numel, real, BLOCK, **LAUNCH)
        ties_before = ties_in.cumsum(0) - ties_in
    prune_kernel[grid](
        base, tuned, theta, threshold, ties, ties_before, out, numel, real, BLOCK, **LAUNCH
    )  # fmt: skip
    return out
