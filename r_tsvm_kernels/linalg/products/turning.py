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
        smallest: estimate of the smallest singular value of X, from above; 0 if X has no full rank.
    """

    defect: float
    turned: float
    sensitivity: list[float]
    smallest: float


Solve = Callable[[Tensor], Tensor]


def weakest(inverse: Solve, batch: int, k: int, device: torch.device) -> Tensor:
    """Return orthonormal directions of the smallest singular values of X, Z (batch, k, SMALLEST)."""
    Z = gaussian(k, min(SMALLEST, k), device).expand(batch, -1, -1)
    for _ in range(ROUNDS):
        Z, _ = cholesky_qr(inverse(Z), passes=2)
    return Z


def measure(
    X: Tensor, Q: Tensor, root: Solve, Z: Tensor, core: Tensor, inside: Tensor | None, beyond: Tensor | None
) -> Tensor:
    """Measure the numbers for a `Turning`, see `interpret`; all in one tensor on the device.

    Args:
        X: (B, m, k) float64.
        Q: (B, m, k) float64, its polar factor.
        root: returns ``S z``, float64.
        Z: from `weakest`.
        core: (B, k, any number) float64, the factor of Q.
        inside: (B, k, d) columns a, by which an error moves X.
        beyond: (B, m, d) as many columns b.

    Returns:
        (B, any number) float64.
    """
    k, device = X.shape[-1], X.device
    tiny = torch.finfo(core.dtype).tiny
    size = torch.linalg.vector_norm(core, dim=(-2, -1)).clamp(min=tiny)[:, None]

    def apart(z: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``Z^T z``, and the rest of z."""
        within = Z.mT @ z
        return within, z - Z @ within

    z = gaussian(k, PROBES, device).expand(len(X), -1, -1)
    of_core = core @ gaussian(core.shape[-1], PROBES, device)
    both = torch.cat([z, of_core], -1)
    lost = Q.mT @ (Q @ both) - both
    lengths = torch.linalg.vector_norm(torch.stack([lost, both]).view(2, len(X), k, 2, PROBES), dim=(-3, -1))
    defect = (lengths[0] / lengths[1].clamp(min=tiny)).amax(-1)
    skew = torch.linalg.vector_norm(Q.mT @ (X @ z) - X.mT @ (Q @ z), dim=(-2, -1)) / (2 * k * PROBES**0.5)
    _, bulk = apart(z)
    _, moved = apart(root(bulk))
    traces = (bulk * moved).sum(-2)
    seen = Z.mT @ core / size[..., None]
    numbers = [
        torch.stack(
            [
                defect,
                skew,
                traces.mean(-1).abs() + 2 * traces.std(-1) / PROBES**0.5,
                torch.linalg.vector_norm(moved, dim=(-2, -1)) / PROBES**0.5,
            ],
            -1,
        ),
        (Z.mT @ root(root(Z))).flatten(1),
        (seen @ seen.mT).flatten(1),
    ]
    if inside is None or beyond is None:
        return torch.cat(numbers, 1)
    y = Q.mT @ beyond
    sides = torch.cat([inside, y], -1)
    smallest, rest = apart(sides)
    reached = root(torch.cat([rest, inside], -1))
    _, moved = apart(reached[..., : sides.shape[-1]])
    of_inside = reached[..., sides.shape[-1] :]
    plain = torch.linalg.vector_norm(core.mT @ rest, dim=-2) / size
    seen_by_core = core.mT @ torch.cat([moved, of_inside], -1)
    full, own = (torch.linalg.vector_norm(seen_by_core, dim=-2) / size).tensor_split([sides.shape[-1]], -1)
    half = (rest * moved).sum(-2).clamp(min=0).sqrt()
    numbers += [
        torch.linalg.vector_norm(beyond - Q @ y, dim=-2),
        own,
        half,
        (plain * full).sqrt(),
        full,
        torch.linalg.vector_norm(moved, dim=-2),
        smallest.flatten(1),
    ]
    return torch.cat(numbers, 1)


def interpret(numbers: Sequence[float], k: int, widths: Sequence[int], dominance: float) -> Turning:
    """Make a `Turning` from the measured numbers.

    Args:
        numbers: of one matrix, from `measure`.
        k: columns of X.
        widths: number of directions of each task.
        dominance: largest singular value of the core over its Frobenius norm.
    """
    p = min(SMALLEST, k)
    if not all(map(math.isfinite, numbers)):  # X has no full rank
        return Turning(math.inf, math.inf, [math.inf] * len(widths), 0.0)
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

    total = sum(widths)
    outside, full = (np.array(_take(taken, total)) for _ in range(2))
    (half_a, half_y), (weighed_a, weighed_y), (own_a, own_y), (length_a, length_y) = (
        np.array(_take(taken, 2 * total)).reshape(2, total) for _ in range(4)
    )
    smallest = basis.T @ np.array(_take(taken, 2 * p * total)).reshape(p, 2 * total)
    in_a, in_y = smallest[:, :total], smallest[:, total:]
    norm_a, norm_y = np.linalg.norm(in_a, axis=0), np.linalg.norm(in_y, axis=0)
    inside = (half_a * weighed_y + half_y * weighed_a) / 2
    inside += norm_a * own_y + norm_y * own_a + (norm_a * length_y + norm_y * length_a) * weight
    for j in range(total):
        K = (np.outer(in_y[:, j], in_a[:, j]) - np.outer(in_a[:, j], in_y[:, j])) / sums
        inside[j] += math.sqrt(max(float(np.trace(K @ cores @ K.T)), 0.0))
    moved = outside * full + inside
    of_tasks = np.split(moved, np.cumsum(widths)[:-1]) if widths else []
    return Turning(defect, turned, [float(np.sqrt(np.mean(own**2))) for own in of_tasks], float(h.min()))


def _take(numbers: Iterator[float], count: int) -> list[float]:
    return [next(numbers) for _ in range(count)]
