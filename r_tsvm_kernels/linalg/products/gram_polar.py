"""Polar factors of tall matrices from products of the size of their Gram matrix, with restarts.

The quintics of Polar Express need only ``G = X^T X``: with P the even part of a quintic at G, the next matrices are
``G <- P G P`` and ``X <- X P``, and the product of all P is ``(X^T X)^(-1/2)``. But rounding hides singular values
below the root of eps in G. The quintics of one stage are therefore made for those that G resolves; X is multiplied out,
which has lifted the smaller ones, and the next stage begins with a new Gram matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .cuda_graph import replayed
from .number_formats import Arithmetic, Operand, Precision, arithmetic, padded
from .polar_express import Quintic, coefficients
from .subspaces import largest_singular_value, smallest_singular_value

# A stage takes singular values down to this many roots of eps: their squares have 4000 times the size of rounding.
RESOLVED = 64
# How far from 1 the other stages leave singular values, and the last one.
ROUGHLY, NEARLY = 0.5, 1e-7
# Largest number of stages. They reach condition 1e5 in float32's precision, what `polar_express` reaches too.
STAGES = 4


@dataclass(frozen=True)
class GramPolar:
    """Polar factors of a batch of matrices.

    Attributes:
        matrix: (B, m, k) ``X (X^T X)^(-1/2)``, float32, or float64 if that was the precision.
        root: (B, k, k) ``(X^T X)^(-1/2)`` over `gain`, in the same dtype.
        gain: (B,) float64, an upper bound of the largest singular value of the inverse root.
        smallest: (B,) float64, estimate of the smallest singular value of X; 0 if no stage resolved it.
        largest: (B,) float64, estimate of the largest one.
        steps: number of quintics.
        stages: number of Gram matrices.
    """

    matrix: Tensor
    root: Tensor
    gain: Tensor
    smallest: Tensor
    largest: Tensor
    steps: int
    stages: int


def gram_polar(matrix: Tensor, precision: Precision = "fp16x3") -> GramPolar:
    """Return the polar factors of tall matrices, see the top of this module.

    A singular value that no stage resolves does not reach 1, which shows in ``Q^T Q``. Waits for the device once per
    stage, to choose the quintics.

    Args:
        matrix: (B, m, k), m >= k, of norms near 1.
        precision: format of the products.
    """
    numbers = arithmetic(precision)
    k, resolved = matrix.shape[-1], RESOLVED * numbers.eps**0.5
    X = numbers.load(padded(matrix, k))
    gram = numbers.dense(numbers.gram(X))
    # The norm of G bounds the square of the largest singular value.
    bound = torch.linalg.vector_norm(gram.double(), dim=(-2, -1)).sqrt().clamp(min=2.0**-500)
    X = numbers.load(numbers.dense(X) / _of_each(bound, gram))
    gram = gram / _of_each(bound.square(), gram)
    root = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device).expand_as(gram)
    growth, scale, steps = 1.0, 1.0, 0
    smallest = largest = bound
    for stage in range(1, STAGES + 1):
        factors, low = smallest_of_gram(gram[..., :k, :k])
        smallest = bound * low / growth
        if stage == 1:
            largest = bound * largest_singular_value(factors).nan_to_num(1.0)
        lower = scale * float(low.amin()) / 1.2  # an estimate from above
        last = lower >= resolved or stage == STAGES
        quintics = coefficients(
            min(max(lower, resolved), 0.9), max(NEARLY, numbers.eps) if last else ROUGHLY, 64 * numbers.eps
        )
        P = replayed(even_parts, numbers.load(gram * scale**2), quintics, numbers)
        slope = scale
        for a, _, _ in quintics:
            slope *= a
        X = numbers.multiply(X, P, scale)
        root = numbers.dense(numbers.multiply(numbers.load(root), P, scale / slope))
        growth, steps = growth * slope, steps + len(quintics)
        if last:
            break
        gram, scale = numbers.dense(numbers.gram(X)), 1 / (1 + ROUGHLY)
    return GramPolar(
        numbers.dense(X)[..., :k],
        ((root + root.mT) / 2)[..., :k, :k],
        growth / bound,
        smallest,
        largest,
        steps,
        stage,
    )


def even_parts(gram: Operand, quintics: tuple[Quintic, ...], numbers: Arithmetic) -> Operand:
    """Return the product of ``a I + b G + c G^2`` over all quintics, with G as they change it."""
    G, (a, b, c) = gram, quintics[0]
    Z = numbers.square(G, b, c)
    first = numbers.dense(Z).clone()
    first.diagonal(dim1=-2, dim2=-1).add_(a)
    result = numbers.load(first)
    for following in quintics[1:]:
        half = numbers.multiply(G, Z, 1.0, a, G)
        G = numbers.multiply(half, Z, 1.0, a, half)
        a, b, c = following
        Z = numbers.square(G, b, c)
        result = numbers.multiply(result, Z, 1.0, a, result)
    return result


def smallest_of_gram(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Return the Cholesky factors of ``X^T X``, and an estimate of the smallest singular value of each X.

    It is 0 where the Gram matrix does not resolve it.
    """
    factors, failed = torch.linalg.cholesky_ex(gram.double(), upper=True)
    smallest, _ = smallest_singular_value(factors)
    return factors, torch.where(failed > 0, 0.0, smallest.nan_to_num(0.0))


def _of_each(factor: Tensor, like: Tensor) -> Tensor:
    return factor[:, None, None].to(like.dtype)
