"""Splitting into planes in Triton: one read, two writes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._planes import Planes
from .._triton import LAUNCH, block_offsets, device_of, flat
from .._triton_products import low_plane

BLOCK = 2048


@triton.jit
def split_kernel(x_ptr, inverse_ptr, hi_ptr, lo_ptr, numel, BLOCK: tl.constexpr):
    """``hi = fp16(x inverse)``, ``lo = fp16((x inverse - hi) 2^11)`` for a batch of matrices."""
    blocks = tl.cdiv(numel, BLOCK)
    program = tl.program_id(0).to(tl.int64)
    block, batch = program % blocks, program // blocks  # the second axis of a grid ends at 65535
    offsets, inside = block_offsets(block, numel, BLOCK)
    offsets += batch * numel
    # The inverse of a power of two within the normal numbers: exact.
    value = tl.load(x_ptr + offsets, mask=inside, other=0.0) * tl.load(inverse_ptr + batch)
    hi = value.to(tl.float16)
    tl.store(hi_ptr + offsets, hi, mask=inside)
    if lo_ptr is not None:
        tl.store(lo_ptr + offsets, low_plane(value, hi), mask=inside)


def run(x: Tensor, scale: Tensor, low: bool) -> Planes:
    """See `split_planes`."""
    hi = torch.empty(x.shape, dtype=torch.float16, device=x.device)
    planes = Planes(hi, torch.empty_like(hi) if low else None, scale)
    numel = x.shape[-2] * x.shape[-1]
    if x.numel():
        with device_of(x):
            split_kernel[(triton.cdiv(numel, BLOCK) * (x.numel() // numel),)](
                flat(x), 1 / scale.reshape(-1), planes.hi, planes.lo, numel, BLOCK, **LAUNCH
            )  # fmt: skip
    return planes
