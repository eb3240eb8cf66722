"""A quadratic polynomial of symmetric planes in torch: the definition of correct, to float32 accuracy."""

from __future__ import annotations

import torch
from torch import Tensor

from .._planes import Planes, Product, SymmetricProduct, product, summed, symmetric


def run(
    X: Planes,
    linear: Tensor,
    quadratic: Tensor,
    done: Tensor | None,
    out: SymmetricProduct | None,
    product: Product = product,
) -> SymmetricProduct:
    """Return ``linear X + quadratic X X``, X without its scale; one leading dimension. `out` is not needed here."""
    plain = X.unscaled()
    value = symmetric(linear[:, None, None] * plain + quadratic[:, None, None] * product(X, X))
    if done is not None:
        value = torch.where(done[:, None, None] > 0, X.dense(), value)
    return summed(value, X, "planes")
