"""Magnitude selection in Triton: the k-th largest magnitude, digit by digit, from histograms of its bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._checks import accumulation_dtype, raise_not_finite
from .._triton import LAUNCH, REAL, device_of, flat, load_delta
from . import MagnitudeSelection

BLOCK = 4096
PROGRAMS = 512  # at most; each counts many blocks in registers before it adds to the histogram in memory


class _Format(NamedTuple):
    """How the magnitude bits of a dtype are cut into digits, the highest first, of at most 11 bits: 2048 bins."""

    integer: torch.dtype
    exponent: int  # bits
    digits: tuple[int, ...]  # bits of each; the first holds the exponent, so that it tells infinity and NaN


FORMATS = {
    torch.bfloat16: _Format(torch.int16, 8, (8, 7)),
    torch.float16: _Format(torch.int16, 5, (8, 7)),
    torch.float32: _Format(torch.int32, 8, (11, 10, 10)),
    torch.float64: _Format(torch.int64, 11, (11, 11, 11, 10, 10, 10)),
}


@triton.jit
def magnitude_bits(x):
    """Bits of ``|x|`` as an integer, int32 or int64: they are ordered as the magnitudes are."""
    if x.dtype == tl.float64:
        bits = x.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
    elif x.dtype == tl.float32:
        bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    else:
        bits = x.to(tl.int16, bitcast=True).to(tl.int32) & 0x7FFF
    return bits


@triton.jit
def digit_kernel(
    x_ptr, base_ptr, theta_ptr, prefix_ptr, counts_ptr, numel, blocks,
    REAL: tl.constexpr, SHIFT: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``counts[d] += #{i: the bits of |x_i| begin with prefix, and the digit after it is d}``.

    The digit has BITS bits with SHIFT bits below it. With `base_ptr`, x is ``x - base`` in REAL, clipped at theta.
    """
    prefix = tl.load(prefix_ptr)
    counts = tl.zeros((1 << BITS,), tl.int32)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    for _ in range(tl.program_id(0), blocks, tl.num_programs(0)):
        offsets = start + tl.arange(0, BLOCK)  # (BLOCK,)
        inside = offsets < numel
        if base_ptr is None:
            x = tl.load(x_ptr + offsets, mask=inside, other=0.0)
        else:
            x = load_delta(base_ptr, x_ptr, theta_ptr, offsets, inside, REAL)
        bits = magnitude_bits(x)
        digit = ((bits >> SHIFT) & ((1 << BITS) - 1)).to(tl.int32)
        matches = (bits >> (SHIFT + BITS)) == prefix.to(bits.dtype)
        counts += tl.histogram(digit, 1 << BITS, mask=inside & matches)
        start += tl.num_programs(0).to(tl.int64) * BLOCK
    # Integers: the order of the additions does not matter.
    tl.atomic_add(counts_ptr + tl.arange(0, 1 << BITS), counts.to(tl.int64), mask=counts > 0, sem="relaxed")


def run(x: Tensor, keep: Sequence[int], base: Tensor | None = None) -> list[MagnitudeSelection]:
    """See `magnitude_select`; one or more numbers, each from 1 to x.numel(), one after the other."""
    return [_select(x, count, base) for count in keep]


def _select(x: Tensor, keep: int, base: Tensor | None) -> MagnitudeSelection:
    """Return one selection. Waits for the device only with a base, to refuse NaN."""
    with device_of(x):
        if base is None:
            return kth_magnitude(flat(x), keep, x.dtype)[0]
        selection, bad = kth_magnitude(flat(x), keep, accumulation_dtype(x, base), flat(base))
    if bad:
        raise_not_finite("magnitude_select", int(bad), x.numel())
    return selection


def kth_magnitude(
    x: Tensor, keep: int, dtype: torch.dtype, base: Tensor | None = None, theta: Tensor | None = None
) -> tuple[MagnitudeSelection, Tensor]:
    """Return the selection, and how many values are NaN or infinite (0-D): the selection means something if none is.

    Args:
        x: contiguous, of `dtype` unless there is a base.
        keep: 1 <= keep <= x.numel().
        dtype: in which magnitudes are compared; with a base float32 or float64.
        base: contiguous; the magnitudes are those of ``x - base``.
        theta: 0-D float64; clip ``x - base`` at it.
    """
    integer, exponent, digits = FORMATS[dtype]
    numel, blocks = x.numel(), triton.cdiv(x.numel(), BLOCK)
    grid = (min(PROGRAMS, blocks),)
    prefix = torch.zeros((), dtype=torch.int64, device=x.device)
    left = torch.full_like(prefix, keep)  # of the magnitudes that begin with the prefix, so many are kept
    bad = prefix
    shift = sum(digits)
    for place, bits in enumerate(digits):
        shift -= bits
        counts = torch.zeros(1 << bits, dtype=torch.int64, device=x.device)
        digit_kernel[grid](
            x, base, theta, prefix, counts, numel, blocks, REAL.get(dtype), shift, bits, BLOCK, **LAUNCH
        )  # fmt: skip
        if place == 0:
            bad = counts[-(1 << (bits - exponent)) :].sum()
        falling = counts.flip(0)
        above = falling.cumsum(0) < left  # the digits above that of the k-th magnitude
        prefix = (prefix << bits) + (counts.numel() - 1) - above.sum()
        left = left - (falling * above).sum()
    return MagnitudeSelection(prefix.to(integer).view(dtype), left), bad
