"""Gram matrices from planes by cuBLAS."""

from __future__ import annotations

from torch import Tensor

from .._cublas import symmetric_product
from .._planes import OutDtype, Planes, SymmetricProduct
from . import reference


def run(A: Planes, scale: Tensor, out_dtype: OutDtype) -> SymmetricProduct:
    """As the reference."""
    return reference.run(A, scale, out_dtype, symmetric_product)
