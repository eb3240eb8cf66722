"""What the Triton kernels share. Importing this module imports triton."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

# How every kernel is launched. A fused multiply-add rounds once where the reference rounds twice, and whether Triton
# fuses by default differs by version.
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
    if values.dtype == tl.bfloat16:  # it is the upper half of a float32; the interpreter's conversion spoils subnormals
        values = (values.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return values.to(REAL)


@triton.jit
def load_delta(base_ptr, tuned_ptr, theta_ptr, offsets, inside, REAL: tl.constexpr):
    """``clamp(tuned - base, -theta, theta)`` in REAL, 0 outside; no clamp where `theta_ptr` is None."""
    delta = load(tuned_ptr, offsets, inside, REAL) - load(base_ptr, offsets, inside, REAL)  # (BLOCK,)
    if theta_ptr is not None:
        theta = tl.load(theta_ptr).to(REAL)
        # In this order a NaN of either side comes through.
        clipped = tl.where(delta > theta, theta, tl.where(delta >= -theta, delta, -theta))
        delta = tl.where(delta == delta, clipped, delta)
    return delta
