"""Code that the Triton kernels share. Importing this module imports triton."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

# Launch options of every kernel. A fused multiply-add rounds once where the reference rounds twice, and the default of
# Triton differs by version.
LAUNCH = {"num_warps": 8, "enable_fp_fusion": False}

# Triton's name of the dtype in which a kernel computes.
REAL = {torch.float32: tl.float32, torch.float64: tl.float64}


def flat(tensor: Tensor) -> Tensor:
    """Return `tensor`, or a contiguous copy: the kernels read memory in the order of the flat index."""
    return tensor.resolve_neg().contiguous()


def device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Make the device of `tensor` the current one, where Triton launches its kernels."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


@triton.jit
def block_offsets(block, numel, BLOCK: tl.constexpr):
    """Flat indices of a block, int64 because tensors exceed 2^31 elements, and which of them exist."""
    offsets = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
    return offsets, offsets < numel


@triton.jit
def load(pointer, offsets, inside, REAL: tl.constexpr):
    """``pointer[offsets]`` in REAL, 0 outside."""
    values = tl.load(pointer + offsets, mask=inside, other=0.0)
    if values.dtype == tl.bfloat16:  # the interpreter's conversion is wrong for subnormals
        values = (values.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return values.to(REAL)


@triton.jit
def rounded(values, dtype: tl.constexpr):
    """`values`, float32 or float64, in `dtype`, rounded as torch rounds: to 16 bits by way of float32."""
    if dtype == tl.float16 or dtype == tl.bfloat16:
        values = values.to(tl.float32)
    if dtype == tl.bfloat16:  # the interpreter's conversion cuts bits off
        bits = values.to(tl.uint32, bitcast=True)
        bits = tl.where(values == values, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, 0x7FC0)
        return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return values.to(dtype)


@triton.jit
def load_delta(base_ptr, tuned_ptr, theta_ptr, offsets, inside, REAL: tl.constexpr):
    """``clamp(tuned - base, -theta, theta)`` in REAL, 0 outside; without base or theta where the pointer is None."""
    delta = load(tuned_ptr, offsets, inside, REAL)  # (BLOCK,)
    if base_ptr is not None:
        delta -= load(base_ptr, offsets, inside, REAL)
    if theta_ptr is not None:
        theta = tl.load(theta_ptr).to(REAL)
        # This order keeps a NaN of either side.
        clipped = tl.where(delta > theta, theta, tl.where(delta >= -theta, delta, -theta))
        delta = tl.where(delta == delta, clipped, delta)
    return delta


@triton.jit
def ties_in_block(magnitude, inside, threshold_ptr):
    """How many magnitudes of a block are equal to the threshold, int64."""
    tied = (magnitude == tl.load(threshold_ptr)) & inside
    return tl.sum(tied.to(tl.int32), axis=0).to(tl.int64)


@triton.jit
def selected(magnitude, inside, threshold_ptr, ties_ptr, ties_before_ptr):
    """Which magnitudes of a block a `MagnitudeSelection` selects; `ties_before_ptr`: how many tie in earlier blocks."""
    threshold = tl.load(threshold_ptr)
    tied = (magnitude == threshold) & inside
    rank = tl.load(ties_before_ptr) + tl.cumsum(tied.to(tl.int32), axis=0)  # of a tie, from 1
    return (magnitude > threshold) | (tied & (rank <= tl.load(ties_ptr)))


@triton.jit
def random_words(block, seed, substream, first, BLOCK: tl.constexpr):
    """The words of `random_mask` for a block, uint32: word i % 4 of the counter (i // 4 as two words; substream; 0).

    `first` is the counter of the first element.
    """
    counter = first + block.to(tl.int64) * (BLOCK // 4) + tl.arange(0, BLOCK // 4)  # (BLOCK / 4,)
    low, high = (counter & 0xFFFFFFFF).to(tl.uint32), (counter >> 32).to(tl.uint32)
    third = tl.zeros_like(low) + substream.to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, low, high, third, tl.zeros_like(low))
    return tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))  # (BLOCK,)
