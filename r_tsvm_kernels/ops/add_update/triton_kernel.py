"""Base plus update in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._checks import accumulation_dtype
from .._triton import LAUNCH, REAL, block_offsets, device_of, flat, load, rounded

BLOCK = 2048


@triton.jit
def add_update_kernel(base_ptr, update_ptr, alpha_ptr, out_ptr, numel, REAL: tl.constexpr, BLOCK: tl.constexpr):
    """``out = base + alpha update``, rounded once to the dtype of `out`.

    Where ``alpha update`` is 0, it is the base: -0.0 + 0.0 would be +0.0.
    """
    offsets, inside = block_offsets(tl.program_id(0), numel, BLOCK)
    start = load(base_ptr, offsets, inside, REAL)
    step = tl.load(alpha_ptr) * load(update_ptr, offsets, inside, REAL)
    merged = tl.where(step == 0, start, start + step)
    tl.store(out_ptr + offsets, rounded(merged, out_ptr.dtype.element_ty), mask=inside)


def run(base: Tensor, update: Tensor, alpha: float, out_dtype: torch.dtype) -> Tensor:
    """See `add_update`."""
    dtype = accumulation_dtype(base, update)
    out = torch.empty(base.shape, dtype=out_dtype, device=base.device)
    if out.numel() == 0:
        return out
    # In memory: Triton would pass a Python float as float32.
    scale = torch.full((), alpha, dtype=dtype, device=base.device)
    with device_of(base):
        add_update_kernel[(triton.cdiv(out.numel(), BLOCK),)](
            flat(base), flat(update), scale, out, out.numel(), REAL[dtype], BLOCK, **LAUNCH
        )  # fmt: skip
    return out
