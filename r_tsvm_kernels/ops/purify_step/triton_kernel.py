"""A step of a purification in Triton: the symmetric product, and one program per matrix that steers the next step."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch
import triton
import triton.language as tl

from .._planes import Planes, SymmetricProduct
from .._steering import DONE, Steering
from .._triton import LAUNCH, device_of
from .._triton_products import symmetric_tiles

BLOCK = 512


@triton.jit
def steering_kernel(
    sums_ptr, values_ptr, counts_ptr, limits_ptr, next_values_ptr, next_counts_ptr, tiles, extra, batch,
    PAIRS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add up the sums of a matrix's tiles, and decide about its next step: `_steering.steered`."""
    own = tl.program_id(0)
    trace, square = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64)
    sums_ptr += tl.cast(own, tl.int64) * tiles * 2
    for first in range(0, tiles, BLOCK):
        tile = first + tl.arange(0, BLOCK)
        trace += tl.load(sums_ptr + 2 * tile, mask=tile < tiles, other=0.0).to(tl.float64)
        square += tl.load(sums_ptr + 2 * tile + 1, mask=tile < tiles, other=0.0).to(tl.float64)
    copied = tl.load(counts_ptr + batch + own) >= 2
    trace_now = tl.where(copied, tl.load(values_ptr + own), tl.sum(trace, axis=0).to(tl.float32))
    square_now = tl.where(copied, tl.load(values_ptr + batch + own), tl.sum(square, axis=0).to(tl.float32))
    rank, since = tl.load(values_ptr + 3 * batch + own), tl.load(counts_ptr + own)

    impurity = trace_now - square_now
    met = tl.full((), 0, tl.int1)
    for pair in tl.static_range(PAIRS):
        near = tl.abs(trace_now - rank) < tl.load(limits_ptr + 2 * pair * batch + own)
        met = met | (near & (impurity < tl.load(limits_ptr + (2 * pair + 1) * batch + own)))
    rank = tl.where(met & (since == 0), tl.floor((trace_now + 0.5).to(tl.float64)).to(tl.float32), rank)
    since += tl.where(met | (since > 0), 1, 0)
    done = tl.maximum(since - extra, 0)
    shrink = tl.where((trace_now - rank) * impurity > 0, 1.0, 0.0)
    running = done == 0
    tl.store(next_values_ptr + own, trace_now)
    tl.store(next_values_ptr + batch + own, square_now)
    tl.store(next_values_ptr + 2 * batch + own, tl.where(running, shrink, -1.0))
    tl.store(next_values_ptr + 3 * batch + own, rank)
    tl.store(next_values_ptr + 4 * batch + own, tl.where(running, 2 - 2 * shrink, 1.0))
    tl.store(next_values_ptr + 5 * batch + own, tl.where(running, 2 * shrink - 1, 0.0))
    tl.store(next_counts_ptr + own, since)
    tl.store(next_counts_ptr + batch + own, done)


def run(X: Planes, steering: Steering, out: Planes | None) -> tuple[Planes, Steering]:
    """See `purify_step`."""
    values, counts, limits = (x.contiguous() for x in (steering.values, steering.counts, steering.limits))
    # Without `out` there is no copy yet.
    done = counts[DONE] if out is not None else counts[DONE].clamp(max=1)
    old = None if out is None else SymmetricProduct(out, X.scale, X.scale)
    linear, quadratic = steering.factors
    matrix, sums = symmetric_tiles(X, quadratic.contiguous(), "planes", linear.contiguous(), done, old)
    following = replace(steering, values=torch.empty_like(values), counts=torch.empty_like(counts))
    batch = len(X.scale)
    if batch:
        with device_of(sums):
            steering_kernel[(batch,)](
                sums, values, counts, limits, following.values, following.counts, sums.shape[1], steering.extra, batch,
                PAIRS=len(limits), BLOCK=BLOCK, **LAUNCH,
            )  # fmt: skip
    return cast(Planes, matrix), following
