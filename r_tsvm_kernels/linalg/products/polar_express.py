"""Polar factors from matrix products alone: Polar Express, with coefficients for any lower bound."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from torch import Tensor

from ...errors import ConfigError
from ..orthonormal import orthogonality
from .cuda_graph import replayed
from .number_formats import Arithmetic, Operand, Precision, arithmetic, padded

# For small l, the best polynomial on all of [l, 1] maps much of it to near 0, where rounding errors grow. Aiming at
# [CUSHION, 1] instead costs almost no speed; the value is that of the published coefficients.
CUSHION = 0.02407327424182761

Quintic = tuple[float, float, float]


def best_quintic(low: float, high: float) -> Quintic:
    """Return a, b, c of the odd polynomial ``a x + b x^3 + c x^5`` that is nearest to 1 on [low, high].

    Remez exchange: the error has four extrema of equal size, two of them at the ends.
    """
    if high - low < 1e-5 * high:  # the limit, whose error is of third order
        middle = (low + high) / 2
        return 15 / 8 / middle, -10 / 8 / middle**3, 3 / 8 / middle**5
    x = np.linspace(low, high, 4)
    for _ in range(100):
        system = np.stack([x, x**3, x**5, [1, -1, 1, -1]], axis=1)
        a, b, c, _ = np.linalg.solve(system, np.ones(4))
        root = np.sqrt(max(9 * b * b - 20 * a * c, 0.0))  # of the derivative a + 3 b x^2 + 5 c x^4
        inner = np.sqrt(np.clip([(-3 * b - root) / (10 * c), (-3 * b + root) / (10 * c)], low**2, high**2))
        moved = np.array([low, *np.sort(inner), high])
        if np.abs(moved - x).max() < 1e-14 * high:
            break
        x = moved
    return float(a), float(b), float(c)


@lru_cache(maxsize=64)
def coefficients(lower: float, tolerance: float, margin: float = 0.0, cushion: float = CUSHION) -> tuple[Quintic, ...]:
    """Return the quintics whose composition maps [lower, 1] to ``1 +- tolerance``.

    Each is the best one for the image of the interval under its predecessors (Amsel et al., "The Polar Express", arXiv
    2505.16932, algorithm 1), except that an interval that starts below `cushion` times its end is cut there and the
    polynomial scaled so that the ends of the image are symmetric about 1. Beyond its interval a quintic grows fast:
    each is made for an interval that reaches `margin` further, for singular values that rounding lifted.

    Raises:
        ConfigError: `lower` is not in (0, 1] or `tolerance` below 1e-15.
    """
    if not 0 < lower <= 1 or tolerance < 1e-15:
        raise ConfigError(f"polar express: needs 0 < lower <= 1 and tolerance >= 1e-15, got {lower} and {tolerance}")
    low, high = lower, 1.0
    steps: list[Quintic] = []
    while max(high - 1, 1 - low) > tolerance:
        high *= 1 + margin
        a, b, c = best_quintic(max(low, cushion * high), high)
        ends = [a * x + b * x**3 + c * x**5 for x in (low, high)]
        scale = 2 / sum(ends) if cushion * high > low else 1.0
        steps.append((scale * a, scale * b, scale * c))
        low = scale * ends[0]
        high = 2 - low
    return tuple(steps)


@dataclass(frozen=True)
class Polar:
    """A polar factor with measurements.

    Attributes:
        matrix: (..., m, k) float32, or float64 if that was the precision.
        steps: number of quintic steps.
    """

    matrix: Tensor
    steps: int

    @property
    def orthogonality(self) -> Tensor:
        """Largest entry of ``|Q^T Q - I|`` (...), computed in float64. Near 1 if singular values were below `lower`."""
        return orthogonality(self.matrix.double())


def polar_express(
    matrix: Tensor, bound: float, lower: float = 1e-4, precision: Precision = "fp16x3", tolerance: float = 1e-7
) -> Polar:
    """Return the polar factors of tall matrices.

    ``X <- a X + X (b Y + c Y Y)`` with ``Y = X^T X`` (4 symmetric products of size k for square X), coefficients from
    `coefficients`. Singular values below ``lower * bound`` do not reach 1; exact zeros stay zero.
    Takes one more step for each factor of 4 in `lower`.

    Args:
        matrix: (..., m, k), m >= k.
        bound: upper bound of the singular values; ``sqrt(T)`` for T orthonormal bases side by side.
        lower: smallest singular value that must become 1, relative to `bound`.
        precision: format of the products.
        tolerance: distance of the singular values from 1 in exact arithmetic.
    """
    X = arithmetic(precision).load(padded(matrix, matrix.shape[-1]))
    return polar_of_operand(X, matrix.shape[-1], bound, lower, precision, tolerance)


def polar_of_operand(
    X: Operand,
    columns: int,
    bound: float,
    lower: float,
    precision: Precision,
    tolerance: float = 1e-7,
    gram: Operand | None = None,
) -> Polar:
    """Return the polar factors of the first columns of `X`, see `polar_express`; `gram` is ``X^T X`` if it is known."""
    numbers = arithmetic(precision)
    steps = coefficients(lower, max(tolerance, numbers.eps), 64 * numbers.eps)
    gram = numbers.times(numbers.gram(X) if gram is None else gram, bound**-2)
    result = numbers.dense(replayed(compose, numbers.times(X, 1 / bound), gram, steps, numbers))[..., :columns]
    return Polar(result, len(steps))


def compose(X: Operand, gram: Operand, steps: tuple[Quintic, ...], numbers: Arithmetic) -> Operand:
    """Apply the quintics to the singular values of X, one after the other; `gram` is ``X^T X``."""
    for index, (a, b, c) in enumerate(steps):
        Y = numbers.gram(X) if index else gram
        Z = numbers.square(Y, b, c)
        X = numbers.multiply(X, Z, 1.0, a, X)
    return X
