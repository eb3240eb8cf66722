"""How errors of a basis X and of the arithmetic turn its polar factor Q, measured on a few vectors.

To first order, with h the singular values of X and S = (X^T X)^(-1/2), an error that turns the direction a of X towards
b moves Q by ``b_out (S a)^T`` for the part b_out of b outside the range of X, and by ``Q K`` with the skew matrix

    K_ij = (y_i a_j - a_i y_j) / (h_i + h_j),     y = Q^T b,

in the right singular basis of X. A few h are far smaller than all others, and for these the difference in K matters:
they are treated separately, in the span of Z. For the others, the geometric mean replaces ``h_i + h_j``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..on_device import gaussian
from ..orthonormal import cholesky_qr

PROBES = 16
# Number of smallest singular values that are treated separately, and rounds of inverse iteration that find them.
SMALLEST, ROUNDS = 8, 6


@dataclass(frozen=True)
class Turning:
    """Errors of a polar factor.

    Attributes:
        defect: relative distance from an isometry, on random vectors and on the weighted cores.
        turned: relative error of the product with the weighted cores by rounding, beyond `defect`.
        sensitivity: for each task, the relative change of that product by an error of its basis.
    """

    defect: float
    turned: float
    sensitivity: list[float]


Solve = Callable[[Tensor], Tensor]


def measure(
    X: Tensor, Q: Tensor, inverse: Solve, core: Tensor, directions: Sequence[tuple[Tensor, Tensor]] = ()
) -> Tensor:
    """Measure the numbers for a `Turning`, see `interpret`; all in one tensor on the device.

    Args:
        X: (m, k) float64.
        Q: (m, k) float64, its polar factor.
        inverse: returns ``(X^T X)^-1 z``, float64.
        core: (k, any number) float64, the factor of Q.
        directions: for each task, columns a (k_t, d) in its block of X, and as many columns b (m, d), by which an error
            moves X.
    """
    k, device = X.shape[1], X.device
    tiny = torch.finfo(core.dtype).tiny
    size = torch.linalg.vector_norm(core).clamp(min=tiny)

    Z = gaussian(k, min(SMALLEST, k), device)
    for _ in range(ROUNDS):
        Z, _ = cholesky_qr(inverse(Z), passes=2)

    def apart(z: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``Z^T z``, and the rest of z."""
        inside = Z.mT @ z
        return inside, z - Z @ inside

    def root(z: Tensor) -> Tensor:
        """Return ``S z = (X^T X)^-1 X^T Q z``."""
        return inverse(X.mT @ (Q @ z))

    z = gaussian(k, PROBES, device)
    defects = []
    for probes in (z, core @ gaussian(core.shape[1], PROBES, device)):
        norm = torch.linalg.vector_norm(probes).clamp(min=tiny)
        defects.append(torch.linalg.vector_norm(Q.mT @ (Q @ probes) - probes) / norm)
    skew = torch.linalg.vector_norm(Q.mT @ (X @ z) - X.mT @ (Q @ z)) / (2 * k * PROBES**0.5)
    _, bulk = apart(z)
    _, moved = apart(root(bulk))
    traces = (bulk * moved).sum(0)
    seen = Z.mT @ core / size
    numbers = [
        torch.stack(
            [
                torch.stack(defects).amax(),
                skew,
                traces.mean().abs() + 2 * traces.std() / PROBES**0.5,
                torch.linalg.vector_norm(moved) / PROBES**0.5,
            ]
        ),
        (Z.mT @ inverse(Z)).flatten(),
        (seen @ seen.mT).flatten(),
    ]
    first = 0
    for inside, beyond in directions:
        a = X.new_zeros(k, inside.shape[1])
        a[first : first + len(inside)] = inside
        first += len(inside)
        y = Q.mT @ beyond
        outside = torch.linalg.vector_norm(beyond - Q @ y, dim=0)
        of_both = [outside, torch.linalg.vector_norm(core.mT @ root(a), dim=0) / size]
        for v in (a, y):
            smallest, rest = apart(v)
            _, moved = apart(root(rest))
            plain, full = (torch.linalg.vector_norm(core.mT @ x, dim=0) / size for x in (rest, moved))
            half = (rest * moved).sum(0).clamp(min=0).sqrt()
            of_both += [half, (plain * full).sqrt(), full, torch.linalg.vector_norm(moved, dim=0), smallest]
        numbers += [x.flatten() for x in of_both]
    return torch.cat(numbers)


def solve_gram(R: Tensor, z: Tensor) -> Tensor:
    """Return ``(R^T R)^-1 z`` for upper triangular R."""
    halfway = torch.linalg.solve_triangular(R.mT, z, upper=False)
    solution: Tensor = torch.linalg.solve_triangular(R, halfway, upper=True)
    return solution


def interpret(numbers: Sequence[float], k: int, widths: Sequence[int], dominance: float) -> Turning:
    """Make a `Turning` from the measured numbers.

    Args:
        numbers: from `measure`.
        k: columns of X.
        widths: number of directions of each task.
        dominance: largest singular value of the core over its Frobenius norm.
    """
    p = min(SMALLEST, k)
    if not all(map(math.isfinite, numbers)):  # X has no full rank
        return Turning(math.inf, math.inf, [math.inf] * len(widths))
    taken = iter(numbers)
    defect, skew, trace, norm = _take(taken, 4)
    values, basis = np.linalg.eigh(np.array(_take(taken, p * p)).reshape(p, p))
    h = 1 / np.sqrt(np.maximum(values, 1e-300))
    sums = h[:, None] + h[None, :]
    cores = basis.T @ np.array(_take(taken, p * p)).reshape(p, p) @ basis  # (Z^T C) (Z^T C)^T
    weight = math.sqrt(max(float(np.trace(cores)), 0.0))

    # Rounding gives Q^T X a skew part with entries of similar size.
    among = 2 * skew * math.sqrt(float((1 / sums**2).sum() - (1 / np.diag(sums) ** 2).sum()))
    across = 2 * skew * math.sqrt(p) * norm
    turned = dominance * (0.5 * skew * trace + across) + weight * (across + among)

    sensitivity = []
    for width in widths:
        outside, full = (np.array(_take(taken, width)) for _ in range(2))
        sides = []
        for _ in range(2):
            half, weighed, own, length = (np.array(_take(taken, width)) for _ in range(4))
            smallest = basis.T @ np.array(_take(taken, p * width)).reshape(p, width)
            sides.append((half, weighed, own, length, smallest, np.linalg.norm(smallest, axis=0)))
        (half_a, weighed_a, own_a, length_a, in_a, norm_a), (half_y, weighed_y, own_y, length_y, in_y, norm_y) = sides
        inside = (half_a * weighed_y + half_y * weighed_a) / 2
        inside += norm_a * own_y + norm_y * own_a + (norm_a * length_y + norm_y * length_a) * weight
        for j in range(width):
            K = (np.outer(in_y[:, j], in_a[:, j]) - np.outer(in_a[:, j], in_y[:, j])) / sums
            inside[j] += math.sqrt(max(float(np.trace(K @ cores @ K.T)), 0.0))
        moved = outside * full + inside
        sensitivity.append(float(np.sqrt(np.mean(moved**2))))
    return Turning(defect, turned, sensitivity)


def _take(numbers: Iterator[float], count: int) -> list[float]:
    return [next(numbers) for _ in range(count)]
