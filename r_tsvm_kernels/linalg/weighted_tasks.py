"""The parts of weighted orthogonalisation: each task, the scales of the sums, and the inverse roots."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import ConvergenceError, NonFiniteError
from .inverse_root import PROBES, InverseRoot, root_of_factor, root_of_gram
from .leading_right_vectors import RightVectors
from .merge_accuracy import Side
from .on_device import gaussian
from .tall_matrix import TallMatrix, add_gram


@dataclass(frozen=True)
class Task:
    """A task matrix, and what is known of its SVD.

    Attributes:
        matrix: D_t.
        power: q.
        vectors: leading right singular vectors; None if ``F_t = A_t^T A_t`` is all that is needed.
        complete: whether no direction of D_t was cut off, and q = 1.
    """

    matrix: TallMatrix
    power: float
    vectors: RightVectors | None
    complete: bool

    @property
    def device(self) -> torch.device:
        """Where the matrix is."""
        return self.matrix.matrix.device

    @property
    def norm(self) -> float:
        """n_t in the units of the scaled matrix."""
        return math.sqrt(self.matrix.squared_norm)

    @property
    def values(self) -> Tensor:
        """``s / n_t`` of the vectors (k,)."""
        assert self.vectors is not None
        return self.vectors.cut.values[: self.vectors.V.shape[1]] * (self.matrix.scale / self.norm)

    def value_after(self, count: int) -> float:
        """Return ``s / n_t`` of the first direction after `count` ones, 0 if there is none."""
        assert self.vectors is not None
        values = self.vectors.cut.values if self.complete else self.vectors.cut.values[: len(self.values)]
        return float(values[count]) * self.matrix.scale / self.norm if count < len(values) else 0.0

    def normalised(self) -> Tensor:
        """Return A_t in float64."""
        wide = self.matrix.matrix.to(torch.float64, copy=True)
        return wide.mul_(self.matrix.scale).div_(self.norm)

    def short_gram(self) -> Tensor:
        """Return F_t (n, n)."""
        if self.complete:
            return self.matrix.gram(torch.float64).div_(self.matrix.squared_norm)
        total = torch.zeros(self.matrix.shape[1], self.matrix.shape[1], dtype=torch.float64, device=self.device)
        add_gram(total, self.right_basis())
        return total

    def squared_basis_times(self, R: Tensor) -> Tensor:
        """Return ``F_t R`` (n, n) without forming F_t, which would square the singular values of D_t."""
        basis = self.matrix.triangular_factor().div_(self.norm) if self.complete else self.right_basis()
        return basis.mT @ (basis @ R)

    def left_basis(self, A: Tensor) -> Tensor:
        """Return ``U diag((s / n_t)^q)`` (m, k), or A_t, whose Gram matrix of rows is the same."""
        return A if self.complete else A @ self.leading(len(self.values)).V.mul_(self.norm)

    def right_basis(self) -> Tensor:
        """Return ``diag((s / n_t)^q) V^T`` (k, n), or A_t."""
        if self.complete:
            return self.normalised()
        assert self.vectors is not None
        return (self.vectors.V * self.values**self.power).mT

    def leading(self, count: int) -> RightVectors:
        """Return the first vectors, scaled so that the scaled matrix maps them to ``U diag((s / n_t)^q)``."""
        assert self.vectors is not None
        values, V = self.values[:count], self.vectors.V[:, :count]
        return replace(self.vectors, V=V * (values ** (self.power - 1) / self.norm))

    def deviation(self) -> float:
        """Return by how much ``U diag((s / n_t)^q)`` is not what its name says, relative, from random vectors.

        It is made from V; where q is below 1, errors of V are divided by small singular values.
        """
        if self.complete:
            return 0.0
        basis, squares = self.leading(len(self.values)).V, self.values[:, None] ** (2 * self.power)
        z = gaussian(len(squares), PROBES, basis.device)
        found = basis.mT @ self.matrix.normal_times(basis @ z)
        norm = float(torch.linalg.vector_norm(squares * z))
        return float(torch.linalg.vector_norm(found - squares * z)) / norm if norm else 0.0


@dataclass(frozen=True)
class Scales:
    """Factors of the ``M_t / n_t``, over a power of two near the largest norm.

    Attributes:
        unit: that power of two.
        plain: n_t over `unit`.
        weighted: ``w_t n_t`` over `unit`.
        common: the weight of all tasks; None if they differ, or are 0.
    """

    unit: float
    plain: list[float]
    weighted: list[float]
    common: float | None

    @classmethod
    def of(cls, norms: Sequence[float], weights: Sequence[float]) -> Scales:
        """Multiply the n_t by the weights.

        Raises:
            NonFiniteError: a product overflows.
        """
        unit = 2.0 ** min(max(math.frexp(max(norms))[1], -1000), 1000)
        plain = [norm / unit for norm in norms]
        weighted = [weight * norm for weight, norm in zip(weights, plain, strict=True)]
        if not all(math.isfinite(weight * unit) for weight in weighted):
            raise NonFiniteError("weights times norms overflow float64; check the scale of the weights")
        return cls(unit, plain, weighted, weights[0] if len(set(weights)) == 1 and weights[0] else None)

    @property
    def sums(self) -> list[list[float]]:
        """The factors of the weighted sum, and of the plain one unless that is a multiple of it."""
        return [self.weighted] if self.common is not None else [self.weighted, self.plain]

    def one(self, index: int) -> list[float]:
        """Return the factors of ``M_t`` alone, over `unit`."""
        return [norm if index == t else 0.0 for t, norm in enumerate(self.plain)]

    @property
    def total(self) -> float:
        """Root of the sum of squares of `weighted`."""
        return math.hypot(*self.weighted)

    def retained(self, products: Sequence[float]) -> tuple[float, ...]:
        """Return ``<sum_s M_s, D_t> / n_t^2`` from the products of the last of `sums` with the A_t."""
        factor = 1.0 if self.common is None else self.common
        return tuple(product / factor / norm for product, norm in zip(products, self.plain, strict=True))


def add_scaled(sums: Iterable[Tensor], wanted: Sequence[Sequence[float]], index: int, part: Tensor) -> None:
    """Add ``M_t / n_t`` of task `index` to each of the sums, times its factor there."""
    for total, factors in zip(sums, wanted, strict=True):
        if factors[index]:
            total.add_(part, alpha=factors[index])


@dataclass(frozen=True)
class Root:
    """The inverse root of a Gram matrix.

    Attributes:
        inverse: the root.
        factors: whose product is the Gram matrix.
        escalations: routes that failed, with the reason.
    """

    inverse: InverseRoot
    factors: tuple[Tensor, ...]
    escalations: tuple[str, ...] = ()

    @classmethod
    def of(cls, gram: Tensor, rows: Callable[[], Iterable[Tensor]], exact: bool) -> Root:
        """Take the root of a Gram matrix, or of a factor of `rows` if squaring would lose a singular value."""
        reasons: tuple[str, ...] = ()
        if not exact:
            try:
                return cls(root_of_gram(gram), (gram,))
            except ConvergenceError as failure:
                reasons = (str(failure),)
        R = gram[:0]
        for part in rows():
            R = torch.linalg.qr(torch.cat([R, part]), mode="r").R
        return cls(root_of_factor(R), (R.mT, R), reasons)

    def measured(self, probes: Tensor) -> Side:
        """Measure the error of the polar factor, on random vectors and on `probes`."""
        return Side.measured(self.inverse, probes, self.factors)

    @property
    def gain(self) -> float:
        """Largest singular value of the inverse root."""
        return self.inverse.condition / self.inverse.largest if self.inverse.rank else 0.0
