"""Weighted orthogonalisation by eigenvalue decompositions of Gram matrices.

``D_t = U diag(s) V^T`` is the tall task matrix (m, n) of task t = 1 .. T, ``n_t`` its Frobenius norm,
``A_t = D_t / n_t``, and ``F_t = V diag((s / n_t)^(2 q)) V^T``; for q = 1 that is ``A_t^T A_t``, which needs no SVD. The
Gram matrix of the short side is ``R = sum_t F_t``. The long side is treated in one of two ways:

- `Whole`: with ``L = sum_t U diag((s / n_t)^(2 q)) U^T``, ``M_t = n_t L^(-1/2) A_t F_t R^(-1/2)``.
- `Hybrid`: the k leading directions of each task are orthogonalised on both sides, the others on the short side alone.
  With ``Y_t = U_k diag((s_k / n_t)^q)``, ``X_t = diag((s_k / n_t)^(1 - q)) V_k^T F_t`` and
  ``P = [P_1 .. P_T] = polar([Y_1 .. Y_T])``::

      M_t = n_t (P_t X_t R^(-1/2) + A_t (I - V_k V_k^T) F_t R^(-1))
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ..errors import ConvergenceError, NonFiniteError
from .certificate import CANCELLED, Certificate, Mode, tolerance_of
from .eigen_merge import Images
from .inverse_root import PROBES, InverseRoot, root_of_factor, root_of_gram
from .leading_right_vectors import ROUTES, RightVectors, right_vectors
from .merge_accuracy import Side
from .on_device import gaussian
from .parallel import run_concurrently
from .ranks import Rank
from .rounding import BACKWARD_ERROR, Cut
from .tall_matrix import TallMatrix, add_gram

# From this relative size of rounding in float32 on, products are in float64.
ROUNDING = 2e-6


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
    def norm(self) -> float:
        """n_t in the units of the scaled matrix."""
        return math.sqrt(self.matrix.squared_norm)

    @property
    def values(self) -> Tensor:
        """``s / n_t`` of the vectors (k,)."""
        assert self.vectors is not None
        return self.vectors.cut.values[: self.vectors.V.shape[1]] * (self.matrix.scale / self.norm)

    def normalised(self) -> Tensor:
        """Return A_t in float64."""
        wide = self.matrix.matrix.to(torch.float64, copy=True)
        return wide.mul_(self.matrix.scale).div_(self.norm)

    def short_gram(self) -> Tensor:
        """Return F_t (n, n)."""
        if self.complete:
            return self.matrix.gram(torch.float64).div_(self.matrix.squared_norm)
        assert self.vectors is not None
        total = self.vectors.V.new_zeros(self.matrix.shape[1], self.matrix.shape[1])
        add_gram(total, (self.vectors.V * self.values**self.power).mT.contiguous())
        return total

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
        norm = _norm(squares * z)
        return _norm(found - squares * z) / norm if norm else 0.0


@dataclass(frozen=True)
class WeightedSum:
    """What was measured while a merged matrix was written.

    Attributes:
        ranks: number of directions of each task that are orthogonalised on both sides.
        retained: for each task ``<sum_s M_s, D_t> / n_t^2``; 1.0 if the merge keeps all of the task.
        certificate: estimated accuracy.
    """

    ranks: tuple[int, ...]
    retained: tuple[float, ...]
    certificate: Certificate


def merge_weighted(
    matrices: Sequence[TallMatrix],
    weights: Sequence[float],
    target: Tensor,
    *,
    power: float,
    ranks: Sequence[Rank] | None,
    lead: int | None,
    mode: Mode,
) -> WeightedSum:
    """Write ``sum_t w_t M_t`` to `target`, by the cheapest route that is accurate enough.

    Args:
        matrices: T tall matrices of one shape, none of them zero.
        weights: T factors.
        target: (m, n), a view of the caller's result.
        power: q.
        ranks: largest number of directions of each task; None for all.
        lead: k of `Hybrid`; None for `Whole`.
        mode: ``exact`` or ``fast``.

    Raises:
        ConvergenceError: no route is accurate enough.
        NonFiniteError: weights times norms overflow.
    """
    escalations: tuple[str, ...] = ()
    for first in range(len(ROUTES)):
        try:
            tasks = _decompose(matrices, power, ranks, lead, mode, ROUTES[first:] if first else None)
            merge = _whole if lead is None else partial(_hybrid, lead=lead)
            found = merge(tasks, Scales.of(tasks, weights), target, tolerance_of(mode))
            found.certificate.require()
            break
        except ConvergenceError as failure:
            if first == len(ROUTES) - 1 or (lead is None and power == 1 and ranks is None):
                raise
            escalations += (str(failure),)
    reasons = dict.fromkeys((*escalations, *found.certificate.escalations))
    certificate = replace(found.certificate, escalations=tuple(reasons))
    return replace(found, certificate=certificate.transposed() if matrices[0].transposed else certificate)


def _decompose(
    matrices: Sequence[TallMatrix],
    power: float,
    ranks: Sequence[Rank] | None,
    lead: int | None,
    mode: Mode,
    routes: Sequence[str] | None,
) -> list[Task]:
    """Find the singular vectors that the merge needs."""
    n = matrices[0].shape[1]
    complete = power == 1 and ranks is None
    if complete and lead is None:
        return [Task(matrix, power, None, True) for matrix in matrices]
    every = lead if complete and lead is not None else n
    wanted = [every] * len(matrices) if ranks is None else ranks
    solves = [partial(right_vectors, matrix, rank, mode, routes) for matrix, rank in zip(matrices, wanted, strict=True)]
    found = run_concurrently(solves, n, matrices[0].matrix.device)
    return [Task(matrix, power, vectors, complete) for matrix, vectors in zip(matrices, found, strict=True)]


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
    def of(cls, tasks: Sequence[Task], weights: Sequence[float]) -> Scales:
        """Multiply the norms by the weights.

        Raises:
            NonFiniteError: a product overflows.
        """
        norms = [task.norm / task.matrix.scale for task in tasks]
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

    @property
    def total(self) -> float:
        """Root of the sum of squares of `weighted`."""
        return math.hypot(*self.weighted)

    def retained(self, products: Sequence[float]) -> tuple[float, ...]:
        """Return ``<sum_s M_s, D_t> / n_t^2`` from the products of the last of `sums` with the A_t."""
        factor = 1.0 if self.common is None else self.common
        return tuple(product / factor / norm for product, norm in zip(products, self.plain, strict=True))


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
    def of(cls, gram: Tensor, rows: Callable[[], Iterable[Tensor]]) -> Root:
        """Take the root of a Gram matrix, or of its triangular factor from `rows` if squaring lost a singular value."""
        try:
            return cls(root_of_gram(gram), (gram,))
        except ConvergenceError as failure:
            R = gram[:0]
            for part in rows():
                R = torch.linalg.qr(torch.cat([R, part]), mode="r").R
            return cls(root_of_factor(R), (R.mT, R), (str(failure),))

    def measured(self, probes: Tensor) -> Side:
        """Measure the error of the polar factor, on random vectors and on `probes`."""
        return Side.measured(self.inverse, probes, self.factors)

    @property
    def gain(self) -> float:
        """Largest singular value of the inverse root."""
        return self.inverse.condition / self.inverse.largest if self.inverse.rank else 0.0


def _whole(tasks: Sequence[Task], scales: Scales, target: Tensor, tolerance: float) -> WeightedSum:
    """Orthogonalise both sides as a whole: see the top of this module."""
    (m, n), device = tasks[0].matrix.shape, target.device
    sums = torch.zeros(len(scales.sums), m, n, dtype=torch.float64, device=device)
    left, right = (torch.zeros(size, size, dtype=torch.float64, device=device) for size in (m, n))
    for index, task in enumerate(tasks):
        A, F = task.normalised(), task.short_gram()
        add_gram(left, task.left_basis(A).mT)
        right += F
        image = A @ F
        for total, factors in zip(sums, scales.sums, strict=True):
            total.add_(image, alpha=factors[index])
        del A, F, image
    solves = [
        partial(Root.of, left, lambda: (task.left_basis(task.normalised()).mT for task in tasks)),
        partial(Root.of, right, lambda: (task.right_basis() for task in tasks)),
    ]
    roots = run_concurrently(solves, m, device)
    L, R = (root.inverse.matrix for root in roots)
    merged = [R.after(L.after(total.mT).mT) for total in sums]
    products = [float((merged[-1] * task.normalised()).sum()) for task in tasks]
    probes = merged[0] @ gaussian(n, PROBES, device), merged[0].mT @ gaussian(m, PROBES, device)
    sides = [root.measured(probe) for root, probe in zip(roots, probes, strict=True)]
    size = max(_norm(merged[0]), CANCELLED * scales.total)
    error = sum(side.defect + side.root.rounding for side in sides)
    error += BACKWARD_ERROR * roots[0].gain * roots[1].gain * _norm(sums[0]) / size if size else 0.0
    target.copy_(merged[0].mul_(scales.unit))
    amplified = 2 * sum(root.inverse.condition for root in roots)
    error += max(task.deviation() for task in tasks) * amplified * scales.total / size if size else 0.0
    cuts = [
        (task.vectors.cut, amplified * task.values * abs(weight) / size)
        for task, weight in zip(tasks, scales.weighted, strict=True)
        if task.vectors is not None and size
    ]
    return WeightedSum(
        tuple(n if task.vectors is None else len(task.values) for task in tasks),
        scales.retained(products),
        _certificate(tasks, roots, sides, cuts, error + _eps(target.dtype), tolerance),
    )


def _hybrid(tasks: Sequence[Task], scales: Scales, target: Tensor, tolerance: float, lead: int) -> WeightedSum:
    """Orthogonalise the `lead` first directions on both sides, the others on the short side: see the top."""
    n, device = tasks[0].matrix.shape[1], target.device
    grams = [task.short_gram() for task in tasks]
    right = Root.of(torch.stack(grams).sum(0), lambda: (task.right_basis() for task in tasks))
    R = right.inverse.matrix.bulk
    inverse = R @ R
    leading = [task.leading(lead) for task in tasks]
    images = Images([task.matrix for task in tasks], leading)
    left = Root.of(images.gram(), images.tiles)
    heads, tails, followers = [], [], []
    for task, F, block in zip(tasks, grams, images.blocks, strict=True):
        assert task.vectors is not None
        count = block.stop - block.start
        V = task.vectors.V[:, :count]
        onto = V.mT @ F
        heads.append((task.values[:count, None] ** (1 - task.power) * onto) @ R)
        tails.append(F.sub_(V @ onto) @ inverse)
        followers.append(torch.linalg.vector_norm(onto @ inverse, dim=1))
    del grams, inverse
    headed = math.hypot(*(weight * _norm(head) for weight, head in zip(scales.weighted, heads, strict=True)))
    spread = math.hypot(*(weight * _norm(tail) for weight, tail in zip(scales.weighted, tails, strict=True)))
    products = _Products(tasks, images, left.inverse, heads, tails, scales)
    for dtype in dict.fromkeys((target.dtype, torch.float64)):
        rounding = 4 * _eps(dtype) * (headed + spread / n**0.5)
        if rounding > ROUNDING * headed and dtype != torch.float64:
            continue
        inner, norm, tailed = products.write(target, dtype)
        size = max(norm, CANCELLED * scales.total)
        if rounding <= ROUNDING * size:  # otherwise tasks cancel each other
            break

    z = gaussian(n, PROBES, device)
    weighted = torch.cat([weight * head for weight, head in zip(scales.weighted, heads, strict=True)])
    ends = torch.stack([weight * tail.mT for weight, tail in zip(scales.weighted, tails, strict=True)]).sum(0) @ z
    probes = weighted @ z, torch.cat([weighted.mT @ gaussian(len(weighted), PROBES, device), ends], dim=1)
    sides = [root.measured(probe) for root, probe in zip((left, right), probes, strict=True)]
    error = cut_scale = 0.0
    if size:
        error = (sides[0].defect + sides[0].root.rounding) * headed / size
        error += (sides[1].defect * (headed + 2 * tailed) + 3 * sides[1].root.rounding * scales.total) / size
        error += rounding / size
        conditions = left.inverse.condition + right.inverse.condition
        error += max(task.deviation() for task in tasks) * 2 * conditions * scales.total / size
        cut_scale = 1 / size
    sensitivities = torch.split(sides[0].root.sensitivity, [block.stop - block.start for block in images.blocks])
    cuts = []
    for task, weight, sensitivity, follower in zip(tasks, scales.weighted, sensitivities, followers, strict=True):
        assert task.vectors is not None
        values = task.values[: len(sensitivity)]
        amplified = values**task.power * sensitivity * scales.total + abs(weight) * values * (1 + 2 * follower)
        cuts.append((replace(task.vectors.cut, rank=len(values)), amplified * cut_scale))
    return WeightedSum(
        tuple(len(sensitivity) for sensitivity in sensitivities),
        scales.retained(inner),
        _certificate(tasks, (left, right), sides, cuts, error + _eps(target.dtype), tolerance),
    )


@dataclass(frozen=True)
class _Products:
    """The last products of `Hybrid`.

    Attributes:
        tasks: T tasks.
        images: ``[Y_1 .. Y_T]``, in the scaled units.
        left: the inverse root that turns them into P.
        heads: ``X_t R^(-1/2)``.
        tails: ``(I - V_k V_k^T) F_t R^(-1)``.
        scales: of the M_t.
    """

    tasks: Sequence[Task]
    images: Images
    left: InverseRoot
    heads: Sequence[Tensor]
    tails: Sequence[Tensor]
    scales: Scales

    def write(self, target: Tensor, dtype: torch.dtype) -> tuple[list[float], float, float]:
        """Write the weighted sum, multiplied in `dtype`, by tiles of rows.

        Returns:
            The products of the last of `Scales.sums` with the A_t, and the norms of the sum and of its tails.
        """
        heads = [head.to(dtype) for head in self.heads]
        tails = [(tail / task.norm).to(dtype) for task, tail in zip(self.tasks, self.tails, strict=True)]
        inner, squares, tailed, first = [0.0] * len(self.tasks), 0.0, 0.0, 0
        for image in self.images.tiles():
            rows = slice(first, first + len(image))
            first = rows.stop
            P = self.left.matrix.after(image).to(dtype)
            sums = [target.new_zeros(len(image), target.shape[1], dtype=dtype) for _ in self.scales.sums]
            tiles = [task.matrix.tile(rows, dtype) for task in self.tasks]
            for index, (tile, block) in enumerate(zip(tiles, self.images.blocks, strict=True)):
                part = tile @ tails[index]
                tailed += (self.scales.weighted[index] * _norm(part)) ** 2
                part.addmm_(P[:, block], heads[index])
                for total, factors in zip(sums, self.scales.sums, strict=True):
                    total.add_(part, alpha=factors[index])
            for index, (task, tile) in enumerate(zip(self.tasks, tiles, strict=True)):
                inner[index] += float((sums[-1] * tile).sum(dtype=torch.float64)) / task.norm
            squares += _norm(sums[0]) ** 2
            target[rows] = sums[0].mul_(self.scales.unit)
        return inner, squares**0.5, tailed**0.5


def _certificate(
    tasks: Sequence[Task],
    roots: Sequence[Root],
    sides: Sequence[Side],
    cuts: Sequence[tuple[Cut, Tensor]],
    fixed: float,
    tolerance: float,
) -> Certificate:
    """Add the errors of the subspaces to `fixed`, the error of all else.

    Args:
        tasks: all of them.
        roots: of the long and the short side.
        sides: the same, measured.
        cuts: of the tasks that are cut, with the factor by which an error of each direction enters the merged matrix.
        fixed: relative to the merged matrix.
        tolerance: see `Certificate`.
    """

    def total(allowed: float = 0.0) -> tuple[float, bool]:
        found = [cut.error(allowed, weights=weights, left=True) for cut, weights in cuts if len(weights)]
        return fixed + math.hypot(*(error for error, _ in found)), any(arbitrary for _, arbitrary in found)

    error, arbitrary = total()
    if not error <= tolerance:
        settled = total(allowed=tolerance / (8 * len(tasks)) ** 0.5)
        if settled[0] <= tolerance:
            error, arbitrary = settled
    parts = [task.vectors for task in tasks if task.vectors is not None]
    left, right = (root.inverse for root in roots)
    routes = [part.route for part in parts] + [left.route, right.route]
    reasons = [*(reason for part in parts for reason in part.escalations), *roots[0].escalations, *roots[1].escalations]
    return Certificate(
        error=error,
        orthogonality=max(side.defect for side in sides),
        subspace_error=max((cut.error(left=True)[0] for cut, _ in cuts), default=0.0),
        tolerance=tolerance,
        route=max(routes, key=ROUTES.index),
        basis_rank=(left.rank, right.rank),
        basis_condition=(left.condition, right.condition),
        gap=min((cut.gap for cut, _ in cuts), default=1.0),
        arbitrary=arbitrary or min(left.margin, right.margin) <= BACKWARD_ERROR,
        escalations=tuple(reasons),
    )


def _norm(matrix: Tensor) -> float:
    return float(torch.linalg.vector_norm(matrix))


def _eps(dtype: torch.dtype) -> float:
    return float(torch.finfo(dtype).eps)
