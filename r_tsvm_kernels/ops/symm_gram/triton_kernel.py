"""Gram matrices from planes in Triton, on tensor cores."""

from __future__ import annotations

from torch import Tensor

from .._planes import OutDtype, Planes, SymmetricProduct
from .._triton_products import symmetric_product


def run(A: Planes, scale: Tensor, out_dtype: OutDtype) -> SymmetricProduct:
    """Return ``scale A A^T`` for planes with one leading dimension, whose own scale is left out."""
    return symmetric_product(A, scale, out_dtype)
