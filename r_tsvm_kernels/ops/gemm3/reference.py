"""General products of planes in torch: the definition of correct, to float32 accuracy."""

from __future__ import annotations

import torch
from torch import Tensor

from .._planes import OutDtype, Planes, Product, product, split


def run(
    A: Planes,
    B: Planes,
    scale: Tensor,
    share: Tensor,
    C: Tensor | Planes | None,
    out_dtype: OutDtype,
    product: Product = product,
) -> Tensor | Planes:
    """Return ``scale A @ B + share C``, planes without their scales; one leading dimension."""
    value = scale[:, None, None] * product(A, B)
    if C is not None:
        value = value + share[:, None, None] * (C.unscaled() if isinstance(C, Planes) else C.float())
    if isinstance(out_dtype, torch.dtype):
        return value.to(out_dtype)
    return Planes(*split(value, A.lo is not None), torch.ones_like(A.scale))
