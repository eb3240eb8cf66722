"""TSV-Merge: put the leading subspaces of several task matrices side by side without overlap."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..errors import ConfigError, ConvergenceError, RtsvmError, ShapeError
from .arguments import finite, given_matrices, given_ranks, given_weights
from .certificate import Certificate, Mode, tolerance_of
from .eigen_merge import EigenMerge
from .factored import Factored, merge_factored
from .interference import interference_of_bases
from .leading_right_vectors import ROUTES, right_vectors
from .parallel import run_concurrently
from .products.merge import ProductsMerge, products_tsv_merges
from .products.purification import STEPS
from .ranks import Rank
from .tall_matrix import WORKSPACE, TallMatrix

Solver = Literal["eigen", "products"]


@dataclass(frozen=True)
class TsvMerge:
    """The merged update and what was measured on the way.

    Attributes:
        matrix: (m, n) merged update in the dtype of the task matrices; float32 if they are 16-bit factors.
        ranks: rank used per task: what was asked for, clipped to the numerical rank.
        captured_energy: per task, fraction of the squared Frobenius norm inside the subspaces that were kept.
        certificate: measured accuracy.
        interference: overlap of the tasks' left and of their right subspaces before they were made orthogonal, see
            `interference_of_gram`.
    """

    matrix: Tensor
    ranks: tuple[int, ...]
    captured_energy: tuple[float, ...]
    certificate: Certificate
    interference: tuple[float, float]


def tsv_merge(
    task_matrices: Sequence[Tensor | Factored],
    ranks: Sequence[Rank] | Rank,
    weights: Sequence[float] | Tensor | float | None = None,
    mode: Mode = "exact",
    *,
    solver: Solver = "eigen",
    workspace: int = WORKSPACE,
) -> TsvMerge:
    """Merge task matrices by TSV-Merge (Gargiulo et al., "Task Singular Vectors", CVPR 2025).

    The leading `ranks[t]` left and right subspaces of each task are concatenated to ``U`` and ``V``, both are replaced
    by their canonical polar factor, and the weighted cores go in between:
    ``polar(U) @ blockdiag(w_t * core_t) @ polar(V)^T``. Rows and columns in which every task matrix is zero are
    exactly zero in the result.

    Args:
        task_matrices: T matrices (m, n), float32 or float64, finite, on one device; or all `Factored`, such as LoRA
            updates, which are merged without ever forming a task matrix.
        ranks: T ranks >= 0, or functions of the singular values (see `choose_rank`); their sum should not exceed
            min(m, n), or the bases cannot become orthonormal. One rank alone is for all tasks.
        weights: T factors of the cores; one alone is for all tasks, None means 1.
        mode: ``exact`` or ``fast``, see `Certificate`.
        solver: ``eigen``: eigenvalue decompositions of Gram matrices; ``products``: matrix products on tensor cores
            (see `products`), all tasks in one batch, simulated and slow on a CPU. Where its estimated error is too
            large, where a rank is a rule or above the numerical rank, ``eigen`` takes over.
        workspace: bytes for copies of matrix rows; beside them a few square matrices of the short side are needed.

    Raises:
        ShapeError: the matrices, ranks and weights do not match, or a rank is negative.
        DTypeError: a matrix is not a dense tensor of float32 or float64.
        DeviceError: the matrices are not on one device.
        ConfigError: an unknown mode or solver, a rank that is not a whole number, or a weight that is not finite.
        NonFiniteError: a matrix holds NaN or infinity, or the merged one goes beyond its dtype.
        ConvergenceError: no solver reached the tolerance of `mode`.
    """
    tolerance_of(mode)  # or an error
    if solver not in get_args(Solver):
        raise ConfigError(f"solver must be one of {', '.join(get_args(Solver))}, got {solver!r}")
    numbers = given_ranks(ranks, len(task_matrices), "tsv_merge")
    factors = given_weights(weights, len(task_matrices), "tsv_merge")
    shapes = {tuple(getattr(matrix, "shape", ())) for matrix in task_matrices}
    if len(shapes) != 1 or any(len(shape) != 2 for shape in shapes):
        raise ShapeError(f"tsv_merge: expected matrices of one shape, got {sorted(shapes)}")
    if all(isinstance(matrix, Factored) for matrix in task_matrices):
        factored = [matrix for matrix in task_matrices if isinstance(matrix, Factored)]
        return _from_factors(factored, numbers, factors, mode)
    dense = given_matrices(
        (matrix.dense() if isinstance(matrix, Factored) else matrix for matrix in task_matrices),
        "tsv_merge",
        one_device=True,
    )

    rows, columns = nonzero_support(dense)
    m, n = dense[0].shape
    whole = len(rows) == m and len(columns) == n
    tall = [
        TallMatrix(matrix if whole else matrix[rows[:, None], columns], len(rows) < len(columns), workspace)
        for matrix in dense
    ]
    given_up: tuple[str, ...] = ()
    if solver == "products":
        try:
            return _by_products(dense, rows, columns, numbers, factors, mode)
        except ConvergenceError as failure:
            given_up = (str(failure),)
    of_all = [_of_all_values(rank, min(m, n)) for rank in numbers]
    for first in range(len(ROUTES)):
        try:
            merge = _attempt(tall, of_all, factors, mode, ROUTES[first:] if first else None, given_up)
            break
        except ConvergenceError as failure:
            if first == len(ROUTES) - 1:
                raise
            given_up += (str(failure),)
            for matrix in tall:
                matrix.forget()

    result = torch.zeros_like(dense[0])
    update = result if whole else result.new_zeros(len(rows), len(columns))
    merge.write(update.mT if tall[0].transposed else update)
    if not whole:
        result[rows[:, None], columns] = update
    used = tuple(part.V.shape[1] for part in merge.parts)
    return TsvMerge(finite(result, "tsv_merge"), used, merge.captured_energy(), merge.certificate, merge.interference)


def _attempt(
    matrices: Sequence[TallMatrix],
    ranks: Sequence[Rank],
    weights: Sequence[float],
    mode: Mode,
    routes: Sequence[str] | None,
    given_up: tuple[str, ...],
) -> EigenMerge:
    """Merge by the first of `routes` that does; nothing of a failed attempt stays in memory.

    Raises:
        ConvergenceError: none does.
    """
    solves = [partial(right_vectors, matrix, rank, mode, routes) for matrix, rank in zip(matrices, ranks, strict=True)]
    parts = run_concurrently(solves, matrices[0].shape[1], matrices[0].matrix.device)
    merge = EigenMerge(matrices, parts, weights, tolerance_of(mode), given_up)
    merge.certificate.require()
    return merge


def tsv_merge_layers(
    layers: Sequence[Sequence[Tensor | Factored]],
    ranks: Sequence[Sequence[Rank] | Rank],
    weights: Sequence[Sequence[float] | Tensor | float] | None = None,
    mode: Mode = "exact",
    *,
    solver: Solver = "eigen",
    workspace: int = WORKSPACE,
) -> list[TsvMerge]:
    """Merge several layers; with solver ``products`` those of one shape and number of tasks in one batch.

    A batch fills a GPU where a single small layer does not. What it does not suit (untouched rows or columns, rank
    rules, a result that is not accurate enough) is merged on its own, and so is everything with solver ``eigen``.

    Args:
        layers: for each layer its task matrices, see `tsv_merge`.
        ranks: for each layer the ranks of its tasks.
        weights: for each layer the factors of the cores; None means 1.
        mode: see `tsv_merge`.
        solver: see `tsv_merge`.
        workspace: see `tsv_merge`.

    Raises:
        As `tsv_merge`.
    """
    if len(layers) != len(ranks) or (weights is not None and len(weights) != len(layers)):
        raise ShapeError(f"tsv_merge_layers: {len(layers)} layers, ranks for {len(ranks)}, or weights for others")
    op = "tsv_merge_layers"
    numbers = [given_ranks(own, len(layer), op) for own, layer in zip(ranks, layers, strict=True)]
    all_weights: Sequence[Any] = [None] * len(layers) if weights is None else weights
    factors = [given_weights(own, len(layer), op) for own, layer in zip(all_weights, layers, strict=True)]
    results: dict[int, TsvMerge] = {}
    if solver == "products":
        groups: dict[tuple[object, ...], list[int]] = {}
        stacks: dict[int, Tensor] = {}
        for index, layer in enumerate(layers):
            stack = _stacked(layer, numbers[index])
            if stack is not None:
                stacks[index] = stack
                groups.setdefault((stack.shape, stack.dtype, stack.device), []).append(index)
        for group in (group for group in groups.values() if len(group) > 1):
            batch = torch.stack([stacks.pop(i) for i in group])
            own = [_ranks_for_products(numbers[i], min(batch.shape[-2:])) for i in group]
            merges = products_tsv_merges(batch, own, [factors[i] for i in group], tolerance=_products_tolerance(mode))
            for i, merged, matrices in zip(group, merges, batch, strict=True):
                with suppress(ConvergenceError):  # merged on its own below, where the failure is reported
                    found = _of_products(merged, matrices, mode)
                    results[i] = replace(found, matrix=finite(found.matrix.to(matrices.dtype), "tsv_merge_layers"))
    for i, layer in enumerate(layers):
        if i not in results:
            results[i] = tsv_merge(layer, numbers[i], factors[i], mode, solver=solver, workspace=workspace)
    return [results[i] for i in range(len(layers))]


def _stacked(layer: Sequence[Tensor | Factored], ranks: Sequence[Rank]) -> Tensor | None:
    """Return a layer that `products_tsv_merges` takes as one tensor: alike, finite, touched everywhere; else None."""
    dense = [matrix for matrix in layer if isinstance(matrix, Tensor) and matrix.ndim == 2 and matrix.numel()]
    kinds = {(matrix.shape, matrix.dtype, matrix.device) for matrix in dense}
    if len(kinds) != 1 or len(layer) != len(dense):
        return None
    try:
        dense = given_matrices(dense, "tsv_merge_layers", one_device=True)
        _ranks_for_products(ranks, min(dense[0].shape))
    except RtsvmError:  # `tsv_merge` says what is wrong
        return None
    rows, columns = nonzero_support(dense)
    stack = torch.stack(dense)
    whole = (len(rows), len(columns)) == dense[0].shape and bool(torch.isfinite(stack).all())
    return stack if whole else None


def nonzero_support(matrices: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the rows and columns in which some matrix is not zero: into the others nothing may leak."""
    touched = matrices[0] != 0
    for matrix in matrices[1:]:
        touched |= matrix != 0
    return touched.any(1).nonzero()[:, 0], touched.any(0).nonzero()[:, 0]


def _by_products(
    matrices: Sequence[Tensor],
    rows: Tensor,
    columns: Tensor,
    ranks: Sequence[Rank],
    weights: Sequence[float],
    mode: Mode,
) -> TsvMerge:
    """Merge the touched part by the matrix-product route.

    Raises:
        ConvergenceError: the route is not made for this case, or its result is not accurate enough.
    """
    numbers = _ranks_for_products(ranks, min(len(rows), len(columns)))
    touched = torch.stack([matrix[rows[:, None], columns] for matrix in matrices])
    (merged,) = products_tsv_merges(touched[None], [numbers], [weights], "fp16x3", _products_tolerance(mode))
    found = _of_products(merged, touched, mode)
    result = torch.zeros_like(matrices[0])
    result[rows[:, None], columns] = found.matrix.to(result.dtype)
    return replace(found, matrix=finite(result, "tsv_merge"))


def _ranks_for_products(ranks: Sequence[Rank], short: int) -> list[int]:
    """Return the ranks, if they are such as the matrix-product route can take.

    Raises:
        ConvergenceError: they are not.
    """
    numbers = [rank for rank in ranks if isinstance(rank, int)]
    if len(numbers) != len(ranks) or not all(0 < rank <= short for rank in numbers) or sum(numbers) > short:
        raise ConvergenceError("products: needs ranks that are positive numbers of sum at most min(m, n)")
    return numbers


def _products_tolerance(mode: Mode) -> float | None:
    # fp16 alone is off by up to 2e-2, more than fast mode allows. It saves the second solve with a compressed spectrum.
    return None if mode == "exact" else tolerance_of(mode) / 2


def _of_products(merged: ProductsMerge, matrices: Tensor, mode: Mode) -> TsvMerge:
    """Return the result of the matrix-product route with its certificate.

    Raises:
        ConvergenceError: it is not accurate enough.
    """
    if any(max(part.outer_steps, part.inner_steps) >= STEPS["fp16x3"] for part in merged.parts):
        raise ConvergenceError("products: singular values on both sides of a rank are too close to be told apart")
    ranks = tuple(part.core.shape[0] for part in merged.parts)
    certificate = Certificate(
        error=merged.error,
        orthogonality=merged.orthogonality,
        subspace_error=max(part.subspace_error for part in merged.parts),
        tolerance=tolerance_of(mode),
        route="products-fp16x3",
        basis_rank=(sum(ranks), sum(ranks)),
        basis_condition=merged.condition,
        gap=min(part.gap for part in merged.parts),
    )
    certificate.require()
    energies = tuple(
        min(1.0, float(part.core.square().sum() / matrix.double().square().sum()))
        for part, matrix in zip(merged.parts, matrices, strict=True)
    )
    bases = [part.U for part in merged.parts], [part.Vh.mT for part in merged.parts]
    overlaps = (interference_of_bases(bases[0]), interference_of_bases(bases[1]))
    return TsvMerge(merged.matrix, ranks, energies, certificate, overlaps)


def _of_all_values(rank: Rank, count: int) -> Rank:
    """Let a rank rule see the zeros, too, that belong to rows and columns left out."""
    if isinstance(rank, int):
        return rank
    return lambda values: rank(torch.cat([values, values.new_zeros(count - len(values))]))


def _from_factors(
    matrices: Sequence[Factored], ranks: Sequence[Rank], weights: Sequence[float], mode: Mode
) -> TsvMerge:
    merged = merge_factored(matrices, ranks, weights, mode)
    dtype = torch.float64 if any(matrix.left.dtype == torch.float64 for matrix in matrices) else torch.float32
    update = Factored(merged.update.left.to(dtype), merged.update.right.to(dtype))
    return TsvMerge(
        finite(update.dense(), "tsv_merge"),
        merged.ranks,
        merged.captured_energy,
        merged.certificate,
        merged.interference,
    )
