"""Gram matrices of tensors: geometric methods compute the coefficients of one linear sum from lengths and angles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import NonFiniteError
from ..ops import task_gram
from ..ops._checks import is_finite, tile_elements
from .base import Cost, TensorJob, elementwise_cost


def gram_matrix(tensors: Sequence[Tensor], base: Tensor | None = None) -> Tensor:
    """Return the products ``<X_i, X_j>`` of all tensors, or of their differences from `base`; (T, T) float64, CPU."""
    return checked(task_gram(tensors, base=base)).cpu()


def row_grams(tensors: Sequence[Tensor], base: Tensor) -> Tensor:
    """Return a Gram matrix of the differences from `base` for each row along the last dimension: (rows, T, T)."""
    rows = [tensor.reshape(-1, tensor.shape[-1]) for tensor in (base, *tensors)]
    height = max(1, tile_elements(base.device.type) // rows[0].shape[1])
    grams = []
    for first in range(0, len(rows[0]), height):
        origin, *tiles = (x[first : first + height].double() for x in rows)
        X = torch.stack([tile - origin for tile in tiles], dim=1)
        grams.append(X @ X.mT)
    return checked(torch.cat(grams))


def checked(gram: Tensor) -> Tensor:
    """Return the products; check that they are finite.

    Raises:
        NonFiniteError: squares of finite elements overflow float64.
    """
    if not is_finite(gram):
        raise NonFiniteError("squared norms overflow float64; scale the models down, or exclude the tensor")
    return gram


def cosines(gram: Tensor) -> Tensor:
    """Return the cosines of the angles, 0 for a tensor of zeros, which has no direction."""
    norms = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    lengths = norms.unsqueeze(-1) * norms.unsqueeze(-2)
    return torch.where(lengths > 0, gram / lengths, 0).clamp(-1, 1)


def gram_bytes(job: TensorJob) -> int:
    """Return the bytes of a Gram matrix: one tile of all task vectors, or some of their rows."""
    return 2 * (job.tasks + 2) * 8 * min(tile_elements(job.device_type), job.elements)


def geometric_cost(job: TensorJob, options: Any) -> Cost:
    """Return the cost of a Gram matrix and a linear sum."""
    summing = elementwise_cost(job, options)
    return Cost(max(summing.bytes, gram_bytes(job)), summing.flops + float(job.elements) * (job.tasks + 1) ** 2)
