"""Outlier clipping and magnitude pruning in Triton: the task vector is formed anew in each pass, stored once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._checks import accumulation_dtype, raise_not_finite
from .._planes import Planes
from .._triton import LAUNCH, REAL, block_offsets, device_of, flat, load_delta, selected, ties_in_block
from .._triton_products import low_plane
from ..magnitude_select import MagnitudeSelection
from ..magnitude_select.triton_kernel import kth_magnitudes
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
    base_ptr, tuned_ptr, theta_ptr, threshold_ptr, ties_ptr, ties_before_ptr, inverse_ptr, out_ptr, low_ptr, numel,
    REAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``out_i = d_i`` where ``|d_i| > threshold``, or it is equal and one of the first `ties` that are; 0 elsewhere.

    ``d = clamp(tuned - base, -theta, theta)``; without `threshold_ptr` all of d stays. With `inverse_ptr`, out and
    low are the fp16 planes of ``out * inverse``.
    """
    block = tl.program_id(0)
    offsets, inside = block_offsets(block, numel, BLOCK)
    delta = load_delta(base_ptr, tuned_ptr, theta_ptr, offsets, inside, REAL)  # (BLOCK,)
    if threshold_ptr is not None:
        survives = selected(tl.abs(delta), inside, threshold_ptr, ties_ptr, ties_before_ptr + block)
        delta = tl.where(survives, delta, 0.0)
    if inverse_ptr is None:
        tl.store(out_ptr + offsets, delta, mask=inside)
    else:
        delta = delta * tl.load(inverse_ptr)  # a power of two: exact
        hi = delta.to(tl.float16)
        tl.store(out_ptr + offsets, hi, mask=inside)
        tl.store(low_ptr + offsets, low_plane(delta, hi), mask=inside)


def run(
    base: Tensor, tuned: Sequence[Tensor], statistics: TaskStatistics, outlier_weighting: str, keep: Sequence[int]
) -> list[Tensor]:
    """See `reweight_prune`. Waits for the device once if anything is pruned: to refuse NaN and infinity."""
    dtype = accumulation_dtype(base, *tuned)
    pruned = [torch.empty(base.shape, dtype=dtype, device=base.device) for _ in tuned]
    theta = statistics.theta if outlier_weighting == "clip" else None
    prune_into(pruned, flat(base), [flat(tensor) for tensor in tuned], theta, keep, op="reweight_prune")
    return pruned


def prune_into(
    outputs: Sequence[Tensor],
    base: Tensor | None,
    tuned: Sequence[Tensor],
    theta: Tensor | None,
    keep: Sequence[int],
    op: str,
    planes: Planes | None = None,
) -> None:
    """Write the pruned task vectors; nothing is written before all task vectors are known to be finite.

    Args:
        outputs: contiguous, float32 or float64; they may be `tuned`. With `planes` its high planes, float16.
        base: contiguous, or None for zeros.
        tuned: contiguous.
        theta: float64 (tasks,), clip there.
        keep: number of survivors of each task.
        op: whose name an error carries.
        planes: contiguous (tasks, ...), where the low planes go, and the scales.
    """
    numel, dtype = outputs[0].numel(), torch.float32 if planes else outputs[0].dtype
    real = REAL[dtype]
    if numel == 0:
        return
    grid = (triton.cdiv(numel, BLOCK),)
    limits = [None] * len(tuned) if theta is None else theta.unbind()
    with device_of(outputs[0]):
        selections: dict[int, MagnitudeSelection] = {}
        bad = {}
        for task, count in enumerate(keep):
            if count < numel:
                (selections[task],), bad[task] = kth_magnitudes(tuned[task], [max(count, 1)], dtype, base, limits[task])
        for count in torch.stack(list(bad.values())).tolist() if bad else []:
            if count:
                raise_not_finite(op, count, numel)
        for task, out in enumerate(outputs):
            if keep[task] == 0:
                out.zero_()
                if planes is not None and planes.lo is not None:
                    planes.lo[task].zero_()
                continue
            arguments = (base, tuned[task], limits[task])
            threshold = ties = ties_before = None
            if task in selections:
                threshold, ties = selections[task].threshold, selections[task].ties
                ties_in = torch.empty(grid, dtype=torch.int64, device=out.device)
                tie_kernel[grid](*arguments, threshold, ties_in, numel, real, BLOCK, **LAUNCH)
                ties_before = ties_in.cumsum(0) - ties_in
            inverse = low = None
            if planes is not None and planes.lo is not None:
                inverse, low = 1 / planes.scale[task], planes.lo[task]
            prune_kernel[grid](
                *arguments, threshold, ties, ties_before, inverse, out, low, numel, real, BLOCK, **LAUNCH
            )  # fmt: skip
