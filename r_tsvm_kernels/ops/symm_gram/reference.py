"""Gram matrices from planes in torch: the definition of correct, to float32 accuracy."""

from __future__ import annotations

from torch import Tensor

from .._planes import OutDtype, Planes, Product, SymmetricProduct, product, summed, symmetric


def run(A: Planes, scale: Tensor, out_dtype: OutDtype, product: Product = product) -> SymmetricProduct:
    """Return ``scale A A^T`` for planes with one leading dimension, whose own scale is left out."""
    return summed(symmetric(product(A, A.mT) * scale[:, None, None]), A, out_dtype)
