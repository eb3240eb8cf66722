"""Ranks of magnitudes in torch: the definition of correct."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import accumulation_dtype, check_finite


def run(x: Tensor, base: Tensor | None) -> Tensor:
    """See `magnitude_ranks`; `x` has elements."""
    if base is not None:
        dtype = accumulation_dtype(x, base)
        x = x.to(dtype) - base.to(dtype)
    check_finite(x, "magnitude_ranks")
    # The row is reversed, so that a stable sort puts the higher index first among equals.
    order = x.abs().flip(-1).argsort(dim=-1, stable=True)
    return order.argsort(dim=-1).flip(-1).to(torch.int32).contiguous()
