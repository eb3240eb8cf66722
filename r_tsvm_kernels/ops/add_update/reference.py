"""Base plus update in torch: the definition of correct."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import accumulation_dtype


def run(base: Tensor, update: Tensor, alpha: float, out_dtype: torch.dtype) -> Tensor:
    """See `add_update`."""
    dtype = accumulation_dtype(base, update)
    start, step = base.to(dtype), alpha * update.to(dtype)
    return torch.where(step == 0, start, start + step).to(out_dtype)  # -0.0 + 0.0 would be +0.0
