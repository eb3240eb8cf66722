"""How far a polar factor is from the exact one, measured in float64 on a few vectors.

Q differs from the polar factor of X by three parts: one outside the range of X, a symmetric one, ``(Q^T Q - I) / 2``,
and a skew one K, which turns Q within the range: ``K H + H K = Q^T X - X^T Q`` with ``H = (X^T X)^(1/2)``. K is a sum
of a few products with ``H (H^2 + t^2)^-1``, because::

    1 / (x + y) = 2 / pi integral from 0 to infinity of x / (x^2 + t^2) y / (y^2 + t^2) dt
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..on_device import gaussian
from .gram_polar import GramPolar
from .number_formats import Arithmetic
from .turning import PROBES

# The trapezoidal rule in log t: its step, and how far it reaches beyond the singular values. It is exact to a tenth.
STEP, MARGIN = 3.0, 2.0


@dataclass(frozen=True)
class MeasuredPolar:
    """The polar factor of a tall matrix X, with what is needed to measure its errors.

    Attributes:
        X: (m, k) float64.
        Q: (m, k) float64, the computed polar factor.
        root: ``(X^T X)^(-1/2)`` (k, k) float64, over `gain`.
        gain: a bound of its largest singular value.
        condition: of X; infinite if the smallest singular value is not known.
        H: (k, k) float64, ``(X^T X)^(1/2)``.
        shifted: nodes t with the Cholesky factors of ``H^2 + t^2``.
    """

    X: Tensor
    Q: Tensor
    root: Tensor
    gain: float
    condition: float
    H: Tensor
    shifted: tuple[tuple[float, Tensor], ...]

    @classmethod
    def of_batch(cls, X: Tensor, polar: GramPolar, numbers: Arithmetic) -> list[MeasuredPolar]:
        """Take a batch of polar factors apart.

        Args:
            X: (B, m, k) float64.
            polar: of X.
            numbers: format of products of full size.
        """
        H = numbers.dense(numbers.multiply(numbers.load(X.mT), numbers.load(polar.matrix))).double()
        H = (H + H.mT) / 2
        ends = torch.stack([polar.gain, polar.largest, polar.smallest], 1).tolist()
        return [
            cls(
                X[i],
                polar.matrix[i].double(),
                polar.root[i].double(),
                gain,
                largest / smallest if smallest > 0 else math.inf,
                H[i],
                _shifted(H[i], smallest, largest),
            )
            for i, (gain, largest, smallest) in enumerate(ends)
        ]

    def root_of(self, z: Tensor) -> Tensor:
        """Return ``(X^T X)^(-1/2) z``."""
        return self.root @ z * self.gain

    def inverse(self, z: Tensor) -> Tensor:
        """Return ``(X^T X)^(-1) z``."""
        return self.root_of(self.root_of(z))

    def error(self, z: Tensor) -> float:
        """Bound the norm of the error of ``Q z``."""
        return self.error_within(z) + _norm(self.outside(z))

    def error_transposed(self, w: Tensor) -> float:
        """Bound the norm of the error of ``Q^T w``."""
        y = self.Q.mT @ w
        return self.error_within(y) + _norm(self.root_of(self.X.mT @ (w - self.Q @ y)))

    def error_within(self, z: Tensor) -> float:
        """Bound the norm of the error of ``Q z`` within the range of X."""
        return _norm(self.turned(z)) + _norm(self._isometry(z)) / 2

    def outside(self, z: Tensor) -> Tensor:
        """Return the error of ``Q z`` outside the range of X: ``(X - Q Q^T X) (X^T X)^(-1/2) z``, negative."""
        image = self.X @ self.root_of(z)
        return image - self.Q @ (self.Q.mT @ image)

    def orthogonality(self) -> float:
        """Return ``norm(Q^T Q z - z) / norm(z)`` for random vectors z."""
        z = gaussian(self.Q.shape[1], PROBES, self.Q.device)
        return _norm(self._isometry(z)) / _norm(z)

    def _isometry(self, z: Tensor) -> Tensor:
        return self.Q.mT @ (self.Q @ z) - z

    def turned(self, z: Tensor) -> Tensor:
        """Return ``K z``; infinite if the smallest singular value is not known."""
        total = torch.full_like(z, 0.0 if self.shifted else math.inf)
        for t, factor in self.shifted:
            x = self.H @ torch.cholesky_solve(z, factor)
            x = self.Q.mT @ (self.X @ x) - self.X.mT @ (self.Q @ x)
            total += (2 / math.pi * STEP * t) * (self.H @ torch.cholesky_solve(x, factor))
        return total


def _shifted(H: Tensor, smallest: float, largest: float) -> tuple[tuple[float, Tensor], ...]:
    """Return the nodes t and the Cholesky factors of ``H^2 + t^2``; none if the smallest singular value is 0."""
    if not 0 < smallest <= largest < math.inf:
        return ()
    length = math.log(largest / smallest) + 2 * MARGIN
    count = math.ceil(length / STEP) + 1
    first = (math.log(largest) + math.log(smallest) - (count - 1) * STEP) / 2
    square, nodes = H @ H, []
    for index in range(count):
        t = math.exp(first + index * STEP)
        matrix = square.clone()
        matrix.diagonal().add_(t * t)
        nodes.append((t, torch.linalg.cholesky_ex(matrix).L))
    return tuple(nodes)


def _norm(columns: Tensor) -> float:
    return float(torch.linalg.vector_norm(columns))
