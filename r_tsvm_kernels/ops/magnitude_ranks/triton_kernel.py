"""Ranks of magnitudes in Triton: each row is sorted in registers, long rows and float64 by torch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._checks import accumulation_dtype, check_finite, raise_not_finite
from .._triton import LAUNCH, REAL, device_of, flat, load_delta

# The longest row that is sorted in registers; for longer ones the compiler takes minutes.
LONGEST = 4096


@triton.jit
def rank_kernel(x_ptr, base_ptr, ranks_ptr, bad_ptr, cols, REAL: tl.constexpr, BLOCK: tl.constexpr):
    """Ranks of ``|x - base|`` within row ``program_id(0)``, and how many of the row are NaN or infinite.

    Sorts keys of 64 bits: the bits of the float32 magnitude, above the column counted from the end. Each key is unique
    and says where its rank belongs.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < cols
    bits = load_delta(base_ptr, x_ptr, None, row * cols + column, inside, REAL).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    tl.store(bad_ptr + row, tl.sum(((bits >= 0x7F800000) & inside).to(tl.int64), axis=0))
    keys = (bits.to(tl.int64) << 32) | (cols - 1 - column).to(tl.int64)
    keys = tl.sort(tl.where(inside, keys, 0x7FFFFFFFFFFFFFFF))  # columns outside the row are last
    target = row * cols + cols - 1 - (keys & 0xFFFFFFFF)
    tl.store(ranks_ptr + target, column, mask=inside)


def run(x: Tensor, base: Tensor | None) -> Tensor:
    """See `magnitude_ranks`; `x` has elements. Waits for the device once, to refuse NaN and infinity."""
    dtype = accumulation_dtype(*([x] if base is None else [x, base]))
    rows, cols = x.numel() // x.shape[-1], x.shape[-1]
    ranks = torch.empty(x.shape, dtype=torch.int32, device=x.device)
    if dtype == torch.float64 or cols > LONGEST:
        return _by_torch(x.to(dtype) if base is None else x.to(dtype) - base.to(dtype), ranks)
    block = triton.next_power_of_2(max(cols, 2))  # some versions of Triton cannot sort one element
    bad_in = torch.empty(rows, dtype=torch.int64, device=x.device)
    with device_of(x):
        rank_kernel[(rows,)](
            flat(x), None if base is None else flat(base), ranks, bad_in, cols, REAL[dtype], block, **options(block)
        )  # fmt: skip
    bad = int(bad_in.sum())
    if bad:
        raise_not_finite("magnitude_ranks", bad, x.numel())
    return ranks


def options(block: int) -> dict[str, object]:
    """Return the launch options for a row of this length: each thread holds 4 of its elements.

    With 8 the compiler takes twice as long, and registers leave room for half as many threads.
    """
    lanes = 64 if torch.version.hip else 32
    return {**LAUNCH, "num_warps": max(block // (4 * lanes), 1)}


def _by_torch(x: Tensor, ranks: Tensor) -> Tensor:
    """Fill the ranks by one sort; the reference sorts twice."""
    check_finite(x, "magnitude_ranks")
    cols = x.shape[-1]
    # The row is reversed, so that a stable sort puts the higher index first among equals.
    order = cols - 1 - x.abs().flip(-1).argsort(dim=-1, stable=True)
    places = torch.arange(cols, dtype=torch.int32, device=x.device)
    return ranks.scatter_(-1, order, places.expand(x.shape))
