"""A step of a purification in torch: the definition of correct, to float32 accuracy."""

from __future__ import annotations

from typing import cast

import torch

from .._planes import Planes, Product, product, summed, symmetric
from .._steering import Steering


def run(X: Planes, steering: Steering, out: Planes | None, product: Product = product) -> tuple[Planes, Steering]:
    """See `purify_step`. `out` is not needed here."""
    plain = X.unscaled()
    linear, quadratic = (factors[:, None, None] for factors in steering.factors)
    value = symmetric(linear * plain + quadratic * product(X, X))
    found = summed(torch.where(steering.done[:, None, None] > 0, plain, value), X, "planes")
    return cast(Planes, found.matrix), steering.following(found.trace, found.square_norm)
