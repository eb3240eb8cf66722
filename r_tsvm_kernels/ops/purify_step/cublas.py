"""A step of a purification by cuBLAS."""

from __future__ import annotations

from .._cublas import symmetric_product
from .._planes import Planes
from .._steering import Steering
from . import reference


def run(X: Planes, steering: Steering, out: Planes | None) -> tuple[Planes, Steering]:
    """As the reference."""
    return reference.run(X, steering, out, symmetric_product)
