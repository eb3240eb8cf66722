"""Weighted orthogonalisation by eigenvalue decompositions of Gram matrices.

``D_t = U diag(s) V^T`` is the tall task matrix (m, n) of task t = 1 .. T, ``n_t`` its Frobenius norm,
``A_t = D_t / n_t``, and ``F_t = V diag((s / n_t)^(2 q)) V^T``; for q = 1 that is ``A_t^T A_t``, which needs no SVD. The
Gram matrix of the short side is ``R = sum_t F_t``. The long side is treated in one of two ways:

- `_whole`: with ``L = sum_t U diag((s / n_t)^(2 q)) U^T``, ``M_t = n_t L^(-1/2) A_t F_t R^(-1/2)``.
- `_hybrid`: the k leading directions of each task are orthogonalised on both sides, the others on the short side alone.
  With ``Y_t = U_k diag((s_k / n_t)^q)``, ``X_t = diag((s_k / n_t)^(1 - q)) V_k^T F_t`` and
  ``P = [P_1 .. P_T] = polar([Y_1 .. Y_T])``::

      M_t = n_t (P_t X_t R^(-1/2) + A_t (I - V_k V_k^T) F_t R^(-1))
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ..errors import ConvergenceError
from .certificate import CANCELLED, Certificate, Mode, tolerance_of
from .eigen_merge import Images
from .inverse_root import PROBES, InverseRoot
from .leading_right_vectors import EXACT, ROUTES, right_vectors
from .merge_accuracy import Side
from .on_device import gaussian
from .parallel import run_concurrently
from .ranks import Rank
from .rounding import BACKWARD_ERROR, Cut
from .tall_matrix import TallMatrix, add_gram
from .weighted_tasks import Root, Scales, Task, add_scaled

# From this relative size of rounding in float32 on, products are in float64.
ROUNDING = 4e-6


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
    parts: Sequence[Tensor] = (),
) -> WeightedSum:
    """Write ``sum_t w_t M_t`` to `target`, by the cheapest route that is accurate enough.

    Args:
        matrices: T tall matrices of one shape, none of them zero.
        weights: T factors.
        target: (m, n), a view of the caller's result.
        power: q.
        ranks: largest number of directions of each task; None for all.
        lead: k of `_hybrid`; None for `_whole`.
        mode: ``exact`` or ``fast``.
        parts: T matrices (m, n) that each M_t is written to, or none.

    Raises:
        ConvergenceError: no route is accurate enough.
        NonFiniteError: weights times norms overflow.
    """
    escalations: tuple[str, ...] = ()
    vectorless = lead is None and power == 1 and ranks is None
    for routes in (None, EXACT) if vectorless else (None, ROUTES[1:], EXACT):
        try:
            tasks = _decompose(matrices, power, ranks, lead, mode, routes)
            merge = _whole if lead is None else partial(_hybrid, lead=lead)
            scales = Scales.of([task.norm / task.matrix.scale for task in tasks], weights)
            found = merge(tasks, scales, target, tolerance_of(mode), routes == EXACT, parts=parts)
            found.certificate.require()
            break
        except ConvergenceError as failure:
            if routes == EXACT:
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


def _whole(
    tasks: Sequence[Task],
    scales: Scales,
    target: Tensor,
    tolerance: float,
    exact: bool,
    *,
    parts: Sequence[Tensor] = (),
) -> WeightedSum:
    """Orthogonalise both sides as a whole: see the top of this module."""
    (m, n), device = tasks[0].matrix.shape, target.device
    wanted = [*scales.sums, *(scales.one(index) for index in range(len(parts)))]
    sums = torch.zeros(len(wanted), m, n, dtype=torch.float64, device=device)
    left, right = (torch.zeros(size, size, dtype=torch.float64, device=device) for size in (m, n))
    for index, task in enumerate(() if exact else tasks):
        A, F = task.normalised(), task.short_gram()
        add_gram(left, task.left_basis(A).mT)
        right += F
        add_scaled(sums, wanted, index, A @ F)
        del A, F
    solves = [
        partial(Root.of, left, lambda: (task.left_basis(task.normalised()).mT for task in tasks), exact),
        partial(Root.of, right, lambda: (task.right_basis() for task in tasks), exact),
    ]
    roots = run_concurrently(solves, m, device)
    L, R = (root.inverse.matrix for root in roots)
    if exact:  # both roots are applied to A_t, not to its third power
        for index, task in enumerate(tasks):
            A = task.normalised()
            P, Q = L.after(task.left_basis(A).mT).mT, R.after(task.right_basis())
            add_scaled(sums, wanted, index, P @ (A.mT @ Q if task.complete else task.values[:, None] * Q))
        merged, rounding = list(sums), BACKWARD_ERROR * sum(root.inverse.condition for root in roots) * scales.total
    else:
        rounding = BACKWARD_ERROR * math.prod(root.gain for root in roots) * scales.total
        merged = [R.after(L.after(total.mT).mT) for total in sums]
    for part in reversed(parts):
        part.copy_(merged.pop().mul_(scales.unit))
    products = [float((merged[-1] * task.normalised()).sum()) for task in tasks]
    probes = merged[0] @ gaussian(n, PROBES, device), merged[0].mT @ gaussian(m, PROBES, device)
    sides = [root.measured(probe) for root, probe in zip(roots, probes, strict=True)]
    size = max(_norm(merged[0]), CANCELLED * scales.total)
    target.copy_(merged[0].mul_(scales.unit))
    share = scales.total / size if size else 0.0
    amplified = 2 * sum(root.inverse.condition for root in roots) * share
    error = sum(side.defect + side.root.rounding for side in sides) + max(t.deviation() for t in tasks) * amplified
    error += rounding / size if size else 0.0
    cuts = [
        (task.vectors.cut, amplified * task.values**task.power) for task in tasks if task.vectors is not None and size
    ]
    return WeightedSum(
        tuple(n if task.vectors is None else len(task.values) for task in tasks),
        scales.retained(products),
        _certificate(tasks, roots, sides, cuts, error + _eps(target.dtype), tolerance),
    )


def _hybrid(
    tasks: Sequence[Task],
    scales: Scales,
    target: Tensor,
    tolerance: float,
    exact: bool,
    *,
    lead: int,
    parts: Sequence[Tensor] = (),
) -> WeightedSum:
    """Orthogonalise the `lead` first directions on both sides, the others on the short side: see the top."""
    n, device = tasks[0].matrix.shape[1], target.device
    grams = [] if exact else [task.short_gram() for task in tasks]
    gram = torch.zeros(n, n, dtype=torch.float64, device=device)
    for own in grams:
        gram += own
    right = Root.of(gram, lambda: (task.right_basis() for task in tasks), exact)
    del gram
    R = right.inverse.matrix.bulk
    leading = [task.leading(lead) for task in tasks]
    images = Images([task.matrix for task in tasks], leading)
    left = Root.of(images.gram(), images.tiles, exact)
    heads, tails, followers = [], [], []
    for task, block in zip(tasks, images.blocks, strict=True):
        assert task.vectors is not None
        count = block.stop - block.start
        V, short = task.vectors.V[:, :count], task.squared_basis_times(R) if exact else grams.pop(0) @ R
        onto = V.mT @ short
        heads.append(task.values[:count, None] ** (1 - task.power) * onto)
        rest = short.sub_(V @ onto)
        tails.append(rest @ R)
        followers.append(torch.linalg.vector_norm(onto @ R, dim=1))
    headed = math.hypot(*(weight * _norm(head) for weight, head in zip(scales.weighted, heads, strict=True)))
    spread = math.hypot(*(weight * _norm(tail) for weight, tail in zip(scales.weighted, tails, strict=True)))
    products = _Products(tasks, images, left.inverse, heads, tails, scales, parts)
    for dtype in dict.fromkeys((target.dtype, torch.float64)):
        rounding = 8 * _eps(dtype) * (headed + spread / n**0.5)
        if rounding > ROUNDING * headed and dtype != torch.float64:
            continue
        inner, norm, tailed = products.write(target, dtype)
        size = max(norm, CANCELLED * scales.total)
        if rounding <= ROUNDING * size:  # otherwise tasks cancel each other
            break

    z = gaussian(n, PROBES, device)
    weighted = torch.cat([weight * head for weight, head in zip(scales.weighted, heads, strict=True)])
    followed = torch.stack([weight * tail.mT for weight, tail in zip(scales.weighted, tails, strict=True)]).sum(0) @ z
    probes = weighted @ z, torch.cat([weighted.mT @ gaussian(len(weighted), PROBES, device), followed], dim=1)
    sides = [root.measured(probe) for root, probe in zip((left, right), probes, strict=True)]
    share = scales.total / size if size else 0.0
    # Tails are divided by small singular values twice. They begin at the values after the leading ones.
    ends = [task.value_after(lead) ** (2 if exact else 1) for task in tasks]
    twice = right.gain**2 * math.hypot(*(weight * end for weight, end in zip(scales.weighted, ends, strict=True)))
    conditions = 2 * (left.inverse.condition + right.inverse.condition) * share
    error = max(task.deviation() for task in tasks) * conditions
    if size:
        error += (sides[0].defect + sides[0].root.rounding) * headed / size + rounding / size
        error += sides[1].defect * (headed + 2 * tailed) / size
        error += (3 * sides[1].root.rounding * scales.total + BACKWARD_ERROR * twice) / size
    sensitivities = torch.split(sides[0].root.sensitivity, [block.stop - block.start for block in images.blocks])
    cuts = []
    for task, weight, sensitivity, follower in zip(tasks, scales.weighted, sensitivities, followers, strict=True):
        assert task.vectors is not None
        values = task.values[: len(sensitivity)]
        amplified = values**task.power * sensitivity * share
        if size:
            amplified += abs(weight) / size * values * (1 + 2 * follower)
        cuts.append((replace(task.vectors.cut, rank=len(values)), amplified))
        if not task.complete and scales.total:
            cuts.append(
                (task.vectors.cut, conditions * (1 + right.gain * task.value_after(lead)) * task.values**task.power)
            )
    return WeightedSum(
        tuple(len(sensitivity) for sensitivity in sensitivities),
        scales.retained(inner),
        _certificate(tasks, (left, right), sides, cuts, error + _eps(target.dtype), tolerance),
    )


@dataclass(frozen=True)
class _Products:
    """The last products of `_hybrid`.

    Attributes:
        tasks: T tasks.
        images: ``[Y_1 .. Y_T]``, in the scaled units.
        left: the inverse root that turns them into P.
        heads: ``X_t R^(-1/2)``.
        tails: ``(I - V_k V_k^T) F_t R^(-1)``.
        scales: of the M_t.
        parts: T matrices that each M_t is written to, or none.
    """

    tasks: Sequence[Task]
    images: Images
    left: InverseRoot
    heads: Sequence[Tensor]
    tails: Sequence[Tensor]
    scales: Scales
    parts: Sequence[Tensor] = ()

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
            sums = target.new_zeros(len(self.scales.sums), len(image), target.shape[1], dtype=dtype)
            tiles = [task.matrix.tile(rows, dtype) for task in self.tasks]
            for index, (tile, block) in enumerate(zip(tiles, self.images.blocks, strict=True)):
                part = tile @ tails[index]
                tailed += (self.scales.weighted[index] * _norm(part)) ** 2
                part.addmm_(P[:, block], heads[index])
                add_scaled(sums, self.scales.sums, index, part)
                if self.parts:
                    self.parts[index][rows] = part.mul_(self.scales.plain[index] * self.scales.unit)
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
