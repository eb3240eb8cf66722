"""Outlier clipping and magnitude pruning in Triton: each pass forms the task vector again, the last one stores it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._checks import accumulation_dtype, raise_not_finite
from .._triton import LAUNCH, REAL, block_offsets, device_of, flat, load_delta, selected, ties_in_block
from ..magnitude_select import MagnitudeSelection
from ..magnitude_select.triton_kernel import kth_magnitudes

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


def run(base: Tensor, tuned: Sequence[Tensor], theta: Tensor | None, counts: Sequence[int]) -> list[Tensor]:
    """See `reweight_prune`. Waits for the device once if anything is pruned: to refuse NaN and infinity."""
    dtype, numel = accumulation_dtype(base, *tuned), base.numel()
    results = [torch.empty(base.shape, dtype=dtype, device=base.device) for _ in tuned]
    if numel == 0:
        return results
    real, size = REAL[dtype], BLOCK if dtype == torch.float32 else BLOCK // 2  # 2048 doubles spill on sm_86
    grid = (triton.cdiv(numel, size),)
    origin, *tensors = (flat(tensor) for tensor in (base, *tuned))
    limits = [None] * len(tuned) if theta is None else theta.unbind()
    with device_of(base):
        selections: dict[int, MagnitudeSelection] = {}
        bad = {}
        for task, count in enumerate(counts):
            if count < numel:
                (selections[task],), bad[task] = kth_magnitudes(
                    tensors[task], [max(count, 1)], dtype, origin, limits[task]
                )  # fmt: skip
        for count in torch.stack(list(bad.values())).tolist() if bad else []:
            if count:
                raise_not_finite("reweight_prune", count, numel)
        for task, out in enumerate(results):
            if counts[task] == 0:
                out.zero_()
                continue
            arguments = (origin, tensors[task], limits[task])
            threshold = ties = ties_before = None
            if task in selections:
                threshold, ties = selections[task].threshold, selections[task].ties
                ties_in = torch.empty(grid, dtype=torch.int64, device=out.device)
                tie_kernel[grid](*arguments, threshold, ties_in, numel, real, size, **LAUNCH)
                ties_before = ties_in.cumsum(0) - ties_in
            prune_kernel[grid](*arguments, threshold, ties, ties_before, out, numel, real, size, **LAUNCH)
    return results
