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
PROGRAMS = 512  # at most; each program counts many blocks in registers before it adds to the histogram in memory
TOGETHER = 2  # selections that share the passes; their counts are in registers


class _Format(NamedTuple):
    """The digits of the magnitude bits of a dtype, the highest first, of at most 11 bits (2048 bins) each."""

    integer: torch.dtype
    exponent: int  # bits
    digits: tuple[int, ...]  # bits of each; the first holds the exponent and so shows infinity and NaN


FORMATS = {
    torch.bfloat16: _Format(torch.int16, 8, (8, 7)),
    torch.float16: _Format(torch.int16, 5, (8, 7)),
    torch.float32: _Format(torch.int32, 8, (11, 10, 10)),
    torch.float64: _Format(torch.int64, 11, (11, 11, 11, 10, 10, 10)),
}


@triton.jit
def magnitude_bits(x):
    """Bits of ``|x|`` as an integer, int32 or int64, which is ordered like the magnitude."""
    if x.dtype == tl.float64:
        bits = x.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
    elif x.dtype == tl.float32:
        bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    else:
        bits = x.to(tl.int16, bitcast=True).to(tl.int32) & 0x7FFF
    return bits


# A kernel of its own for tensors of one block would only be one more to compile.
@triton.jit(do_not_specialize=["blocks"])
def digit_kernel(
    x_ptr, base_ptr, theta_ptr, prefixes_ptr, counts_ptr, numel, blocks,
    PREFIXES: tl.constexpr, REAL: tl.constexpr, SHIFT: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``counts[p, d] += #{i: the bits of |x_i| begin with prefixes[p], and the digit after it is d}``.

    The digit has BITS bits with SHIFT bits below it; PREFIXES is a power of 2. Of equal prefixes the last one counts.
    x is ``x - base`` in REAL, clipped at theta, each where there is one; where REAL is None it is x in its own format.
    """
    bins = tl.arange(0, PREFIXES << BITS)
    counts = tl.zeros((PREFIXES << BITS,), tl.int32)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    for _ in range(tl.program_id(0), blocks, tl.num_programs(0)):
        offsets = start + tl.arange(0, BLOCK)  # (BLOCK,)
        inside = offsets < numel
        if REAL is None:
            x = tl.load(x_ptr + offsets, mask=inside, other=0.0)
        else:
            x = load_delta(base_ptr, x_ptr, theta_ptr, offsets, inside, REAL)
        bits = magnitude_bits(x)
        digit = ((bits >> SHIFT) & ((1 << BITS) - 1)).to(tl.int32)
        row = tl.full((BLOCK,), -1, tl.int32)
        for p in tl.static_range(PREFIXES):
            row = tl.where((bits >> (SHIFT + BITS)) == tl.load(prefixes_ptr + p).to(bits.dtype), p, row)
        counts += tl.histogram((row << BITS) | digit, PREFIXES << BITS, mask=inside & (row >= 0))
        start += tl.num_programs(0).to(tl.int64) * BLOCK
    # Integers: the order of the additions does not matter.
    tl.atomic_add(counts_ptr + bins, counts.to(tl.int64), mask=counts > 0, sem="relaxed")


def run(x: Tensor, keep: Sequence[int], base: Tensor | None = None) -> list[MagnitudeSelection]:
    """See `magnitude_select`; each number from 1 to x.numel(). Waits for the device only with a base, to refuse NaN."""
    with device_of(x):
        if base is None:
            return kth_magnitudes(flat(x), keep, x.dtype)[0]
        selections, bad = kth_magnitudes(flat(x), keep, accumulation_dtype(x, base), flat(base))
    if bad:
        raise_not_finite("magnitude_select", int(bad), x.numel())
    return selections


def kth_magnitudes(
    x: Tensor, keep: Sequence[int], dtype: torch.dtype, base: Tensor | None = None, theta: Tensor | None = None
) -> tuple[list[MagnitudeSelection], Tensor]:
    """Return the selections, meaningless unless all values are finite, and how many are NaN or infinite (0-D).

    Args:
        x: contiguous, of `dtype` unless that is float32 or float64.
        keep: one or more numbers, each from 1 to x.numel(); the first `TOGETHER` share the passes over the data, and
            so on.
        dtype: in which magnitudes are compared; with a base float32 or float64.
        base: contiguous; the magnitudes are those of ``x - base``.
        theta: 0-D float64; clip ``x - base`` at it.
    """
    selections: list[MagnitudeSelection] = []
    for first in range(0, len(keep), TOGETHER):
        some, bad = _kth_together(x, keep[first : first + TOGETHER], dtype, base, theta)
        selections += some
    return selections, bad


def _kth_together(
    x: Tensor, keep: Sequence[int], dtype: torch.dtype, base: Tensor | None, theta: Tensor | None
) -> tuple[list[MagnitudeSelection], Tensor]:
    integer, exponent, digits = FORMATS[dtype]
    left = torch.tensor(keep, device=x.device)  # number of magnitudes with this prefix that are kept
    prefix = torch.zeros_like(left)
    bad = prefix[0]
    shift = sum(digits)
    for place, bits in enumerate(digits):
        shift -= bits
        prefixes = prefix[:1] if place == 0 else prefix  # before the first digit all prefixes are equal
        counts = count_digits(x, prefixes, REAL.get(dtype), shift, bits, base, theta)
        if place == 0:
            bad = counts[0, -(1 << (bits - exponent)) :].sum()
        # The last of the equal ones has their counts.
        row = torch.where(prefix[:, None] == prefixes, torch.arange(len(prefixes), device=x.device), 0).amax(1)
        falling = counts[row].flip(1)  # (keep, 2^bits)
        above = falling.cumsum(1) < left[:, None]  # the digits above that of the k-th magnitude
        prefix = (prefix << bits) + (counts.shape[1] - 1) - above.sum(1)
        left = left - (falling * above).sum(1)
    thresholds = prefix.to(integer).view(dtype)
    return [MagnitudeSelection(*pair) for pair in zip(thresholds.unbind(), left.unbind(), strict=True)], bad


def count_digits(
    x: Tensor,
    prefixes: Tensor,
    real: tl.dtype | None,
    shift: int,
    bits: int,
    base: Tensor | None = None,
    theta: Tensor | None = None,
) -> Tensor:
    """Return the counts of `digit_kernel`, int64 (prefixes, 2^bits)."""
    block = BLOCK // 4 if real == tl.float64 else BLOCK  # up to Triton 3.8, more would not fit into registers
    blocks = triton.cdiv(x.numel(), block)
    rows = triton.next_power_of_2(len(prefixes))
    # No magnitude begins with a negative number.
    padded = torch.nn.functional.pad(prefixes, (0, rows - len(prefixes)), value=-1)
    counts = torch.zeros((rows, 1 << bits), dtype=torch.int64, device=x.device)
    if blocks > 0:
        digit_kernel[(min(PROGRAMS, blocks),)](
            x, base, theta, padded, counts, x.numel(), blocks, rows, real, shift, bits, block, **LAUNCH
        )  # fmt: skip
    return counts
