"""Base plus update by the native CUDA module (csrc/cuda/add_update.cu)."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import backends
from .._checks import accumulation_dtype
from .._cuda import flat, queue
from .._native import matrix


def run(base: Tensor, update: Tensor, alpha: float) -> Tensor:
    """See `add_update`."""
    output = torch.empty(base.shape, dtype=accumulation_dtype(base, update), device=base.device)
    tensors = flat(base), flat(update)
    native = backends.native("cuda")
    native.add_update(matrix(tensors[0]), matrix(tensors[1]), alpha, output.data_ptr(), *queue(base))
    return output
