"""How accurate weighted orthogonalisation from matrix products was: measured in float64 on a few random vectors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..on_device import gaussian
from ..weighted_tasks import Scales
from .polar_accuracy import MeasuredPolar
from .subspaces import ProductsSubspaces
from .turning import PROBES, interpret, measure, weakest

# Rounds of iterative refinement, and the largest relative change in the last one that counts as converged.
REFINEMENTS, CONVERGED = 6, 1e-6


@dataclass(frozen=True)
class Accuracy:
    """Measurements for a `Certificate`, which explains them; infinite or NaN if the stacked tasks have no full rank."""

    error: float
    orthogonality: float
    subspace_error: float
    condition: tuple[float, float]
    gap: float


def accuracy_of_whole(
    A: Tensor, left: MeasuredPolar, right: MeasuredPolar, scales: Scales, merged: Tensor, size: float, eps: float
) -> Accuracy:
    """Estimate the error of a merge of whole sides.

    Args:
        A: (T, m, n) float64.
        left: of the transposed matrices.
        right: of the matrices.
        scales: of the M_t.
        merged: (m, n) float64, the weighted sum of the ``M_t / n_t``.
        size: its norm, or what errors are relative to.
        eps: of the products.
    """
    (T, m, n), device = A.shape, A.device
    factors = A.new_tensor(scales.weighted)[:, None, None]
    P, Q = left.Q.view(T, n, m), right.Q.view(T, m, n)
    ahead = (factors * (A.mT @ (Q @ gaussian(n, PROBES, device)))).flatten(0, 1)
    behind = (factors * (A @ (P @ gaussian(m, PROBES, device)))).flatten(0, 1)
    moved = left.error_transposed(ahead) + right.error_transposed(behind)
    return Accuracy(
        moved / PROBES**0.5 / size + 8 * eps * scales.total / size,
        max(polar.orthogonality() for polar in (left, right)),
        0.0,
        (left.condition, right.condition),
        1.0,
    )


@dataclass(frozen=True)
class Hybrid:
    """A hybrid merge.

    Attributes:
        A: (T, m, n) float64.
        N: (T, n, n) float64.
        V: (T, n, k) float64, leading directions.
        heads: (T, k, n) float64, H_t.
        tails: (T, n, n) float64, W_t.
        left: of the images ``A_t V`` side by side.
        right: of the stacked matrices.
        scales: of the M_t.
    """

    A: Tensor
    N: Tensor
    V: Tensor
    heads: Tensor
    tails: Tensor
    left: MeasuredPolar
    right: MeasuredPolar
    scales: Scales

    def accuracy(self, parts: Sequence[ProductsSubspaces], size: float, eps: float) -> Accuracy:
        """Estimate the error.

        Args:
            parts: the leading directions of each task.
            size: norm of the weighted sum of the ``M_t / n_t``, or what errors are relative to.
            eps: of the products.
        """
        (T, m, n), device = self.A.shape, self.A.device
        factors = self.A.new_tensor(self.scales.weighted)[:, None, None]
        heads = (factors * self.heads).flatten(0, 1)
        g, h = gaussian(n, PROBES, device), gaussian(len(heads), PROBES, device)
        moved = self.left.error(heads @ g) + self.right.error_within(heads.mT @ h)
        lost = self.right.outside(g).view(T, m, -1)
        moved += _norm(factors * (self.V.mT @ (self.A.mT @ lost)))
        moved += _norm((factors * (self.A @ self._error_of_tails(g))).sum(0))
        led, spread = _norm(heads), _norm(factors * self.tails)
        rounding = 8 * eps * (self.scales.total + led + spread / n**0.5)
        subspaces = [
            part.subspace_error * (own * led + self._moved(task, part)) / size
            for task, (part, own) in enumerate(zip(parts, self._sensitivity(parts, heads), strict=True))
        ]
        return Accuracy(
            moved / PROBES**0.5 / size + rounding / size + math.hypot(*subspaces),
            max(polar.orthogonality() for polar in (self.left, self.right)),
            max(part.subspace_error for part in parts),
            (self.left.condition, self.right.condition),
            min(part.gap for part in parts),
        )

    def _error_of_tails(self, g: Tensor) -> Tensor:
        """Return the errors of ``W_t g``, from ``R^-1 g`` by iterative refinement; infinite if it does not converge."""
        x, change = torch.zeros_like(g), g
        for _ in range(REFINEMENTS):
            change = self.right.inverse(g - (self.A.mT @ (self.A @ x)).sum(0))
            x = x + change
        short = self.A.mT @ (self.A @ x)
        found = self.tails @ g - (short - self.V @ (self.V.mT @ short))
        settled = torch.linalg.vector_norm(change) <= CONVERGED * torch.linalg.vector_norm(x)
        return torch.where(settled, found, math.inf)

    def _sensitivity(self, parts: Sequence[ProductsSubspaces], heads: Tensor) -> list[float]:
        """Return how far a turn of the leading directions of each task moves P, relative to the weighted heads."""
        left, (k, device) = self.left, (len(heads), heads.device)
        inside: Tensor = torch.block_diag(*(part.inside for part in parts))  # type: ignore[no-untyped-call]
        beyond = torch.cat([A @ part.right_beyond for A, part in zip(self.A, parts, strict=True)], 1)
        Z = weakest(left.inverse, 1, k, device)
        found = measure(left.X[None], left.Q[None], left.root_of, Z, heads[None], inside[None], beyond[None])
        return interpret(found[0].tolist(), k, [part.inside.shape[1] for part in parts], 1.0).sensitivity

    def _moved(self, task: int, part: ProductsSubspaces) -> float:
        """Return how far a turn of the leading directions moves ``w_t n_t (P_t H_t + A_t W_t)`` apart from P_t."""
        A, N, V = self.A[task], self.N[task], self.V[task]
        inside, beyond = V @ part.inside, part.right_beyond
        followed = [N.mT @ x for x in (inside, beyond)]
        ahead = torch.linalg.vector_norm(followed[1], dim=0)
        after = [torch.linalg.vector_norm(self.right.root_of(x), dim=0) for x in followed]
        reached = [torch.linalg.vector_norm(A @ x, dim=0) for x in (inside, beyond)]
        moved = ahead + reached[0] * after[1] + reached[1] * after[0]
        return abs(self.scales.weighted[task]) * float(moved.square().mean().sqrt())


def _norm(columns: Tensor) -> float:
    return float(torch.linalg.vector_norm(columns))
