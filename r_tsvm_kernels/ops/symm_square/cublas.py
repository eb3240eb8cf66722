"""A quadratic polynomial of symmetric planes by cuBLAS."""

from __future__ import annotations

from torch import Tensor

from .._cublas import symmetric_product
from .._planes import Planes, SymmetricProduct
from . import reference


def run(
    X: Planes, linear: Tensor, quadratic: Tensor, done: Tensor | None, out: SymmetricProduct | None
) -> SymmetricProduct:
    """As the reference."""
    return reference.run(X, linear, quadratic, done, out, symmetric_product)
