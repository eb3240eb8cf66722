"""A quadratic polynomial of symmetric planes in Triton, on tensor cores."""

from __future__ import annotations

import torch
from torch import Tensor

from .._planes import Planes, SymmetricProduct
from .._triton_products import symmetric_product


def run(
    X: Planes, linear: Tensor, quadratic: Tensor, done: Tensor | None, out: SymmetricProduct | None
) -> SymmetricProduct:
    """Return ``linear X + quadratic X X``, X without its scale; one leading dimension."""
    if done is None:
        return symmetric_product(X, quadratic, "planes", linear, None, out)
    linear = torch.where(done > 0, X.scale, linear)
    quadratic = torch.where(done > 0, 0.0, quadratic)
    state = done if out is not None else done.clamp(max=1)  # without `out` there is no copy yet
    return symmetric_product(X, quadratic, "planes", linear, state, out)
