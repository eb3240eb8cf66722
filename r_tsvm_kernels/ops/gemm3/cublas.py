"""General products of planes by cuBLAS."""

from __future__ import annotations

from torch import Tensor

from .._cublas import product
from .._planes import OutDtype, Planes
from . import reference


def run(
    A: Planes, B: Planes, scale: Tensor, share: Tensor, C: Tensor | Planes | None, out_dtype: OutDtype
) -> Tensor | Planes:
    """As the reference."""
    return reference.run(A, B, scale, share, C, out_dtype, product)
