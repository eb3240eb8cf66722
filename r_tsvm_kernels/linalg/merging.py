"""TSV-Merge: concatenate the leading subspaces of several task matrices, made orthogonal to each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor

from ..errors import ConfigError, ConvergenceError, ShapeError
from ..foreign_devices import on_own_device
from .arguments import finite, given_matrices, given_ranks, given_weights, nonzero_support, one_for_each_layer
from .certificate import Mode, tolerance_of
from .eigen_merge import merge_by_eigenvalues
from .factored import Factored, merge_factored
from .merge_result import TsvMerge, TsvParts
from .products.layers import merge_by_products, merge_layers_by_products, parts_by_products
from .ranks import Rank, pad_for_rule
from .tall_matrix import WORKSPACE, TallMatrix

Solver = Literal["eigen", "products"]


def check_solver(solver: str) -> None:
    """Check that there is such a solver.

    Raises:
        ConfigError: there is none.
    """
    if solver not in get_args(Solver):
        raise ConfigError(f"solver must be one of {', '.join(get_args(Solver))}, got {solver!r}")


@on_own_device
def tsv_merge(
    task_matrices: Sequence[Tensor | Factored],
    ranks: Sequence[Rank] | Rank,
    weights: Sequence[float] | Tensor | float | None = None,
    *,
    mode: Mode = "exact",
    solver: Solver = "eigen",
    workspace: int = WORKSPACE,
) -> TsvMerge:
    """Merge task matrices by TSV-Merge (Gargiulo et al., "Task Singular Vectors", CVPR 2025, algorithm 1).

    Concatenates the leading `ranks[t]` left and right subspaces of each task to ``U`` and ``V``, replaces both by
    their canonical polar factors, and puts the weighted cores between them:
    ``polar(U) @ blockdiag(w_t * core_t) @ polar(V)^T``. Rows and columns in which every task matrix is zero stay
    exactly zero.

    Args:
        task_matrices: T matrices (m, n), as a list or a tensor (T, m, n); float32 or float64, finite, on one device. Or
            T `Factored` matrices, such as LoRA updates, which are merged without forming a task matrix.
        ranks: rank >= 0, or a function of the singular values (see `choose_rank`): one for all tasks, or one for each.
            Their sum should not exceed min(m, n), or the bases cannot become orthonormal.
        weights: factor of the core: one for all tasks, or one for each; None means 1.
        mode: ``exact`` or ``fast``, see `Certificate`.
        solver: ``eigen``: eigenvalues of Gram matrices. ``products``: matrix products on tensor cores, all
            tasks in one batch; simulated and slow on a CPU. ``products`` falls back to ``eigen`` if its estimated error
            is too large, or if a rank is a rule or above the numerical rank.
        workspace: bytes for copies of matrix rows, beside a few square matrices of the short side.

    Returns:
        The merged update (m, n), with the ranks, the captured energies and the certificate.

    Raises:
        ShapeError: the matrices, ranks and weights do not match, or a rank is negative.
        DTypeError: a matrix is not a dense tensor of float32 or float64.
        DeviceError: the matrices are not on one device.
        ConfigError: an unknown mode or solver, a rank that is not a whole number, or a weight that is not finite.
        NonFiniteError: a matrix holds NaN or infinity, or the merged one overflows its dtype.
        ConvergenceError: no solver reached the tolerance of `mode`.

    Examples:
        >>> generator = torch.Generator().manual_seed(0)
        >>> tasks = [torch.randn(40, 30, generator=generator) for _ in range(3)]
        >>> tsv_merge(tasks, 10)
        TsvMerge(40x30 float32, ranks 10/10/10, error 5e-07 ok)
    """
    tolerance_of(mode)  # or an error
    check_solver(solver)
    numbers = given_ranks(ranks, len(task_matrices), "tsv_merge")
    factors = given_weights(weights, len(task_matrices), "tsv_merge")
    factored, dense = _one_shape(task_matrices, "tsv_merge")
    if factored:
        return _merge_factors(factored, numbers, factors, mode)
    rows, columns = nonzero_support(dense)
    tall = _tall(dense, rows, columns, workspace)
    escalations: tuple[str, ...] = ()
    if solver == "products":
        try:
            return merge_by_products(dense, rows, columns, numbers, factors, mode)
        except ConvergenceError as failure:
            escalations = (str(failure),)
    padded = [pad_for_rule(rank, min(dense[0].shape)) for rank in numbers]
    merge = merge_by_eigenvalues(tall, padded, factors, mode, escalations)

    result = torch.zeros_like(dense[0])
    whole = (len(rows), len(columns)) == result.shape
    update = result if whole else result.new_zeros(len(rows), len(columns))
    merge.write(update.mT if tall[0].transposed else update)
    if not whole:
        result[rows[:, None], columns] = update
    return TsvMerge(
        finite(result, "tsv_merge"), merge.ranks, merge.captured_energy, merge.certificate, merge.interference
    )


def tsv_parts(
    task_matrices: Sequence[Tensor | Factored],
    ranks: Sequence[Rank] | Rank,
    *,
    mode: Mode = "exact",
    solver: Solver = "eigen",
    workspace: int = WORKSPACE,
) -> TsvParts:
    """Return the summands ``M_t = polar(U)_t core_t polar(V)_t^T`` of a TSV-Merge, one for each task.

    They do not depend on the weights: ``sum_t w_t M_t`` is `tsv_merge` with the weights w_t. Relative to its norm, its
    error is at most that of the merge with weights 1, times ``max_t |w_t|`` and the ratio of the two norms.

    Args:
        task_matrices: as for `tsv_merge`.
        ranks: as for `tsv_merge`.
        mode: as for `tsv_merge`.
        solver: as for `tsv_merge`.
        workspace: as for `tsv_merge`.

    Returns:
        T factored matrices (m, n) in float64, with the ranks, the captured energies and the certificate.

    Raises:
        ShapeError, DTypeError, DeviceError, ConfigError, NonFiniteError, ConvergenceError: as `tsv_merge`.

    Examples:
        >>> generator = torch.Generator().manual_seed(0)
        >>> tasks = [torch.randn(40, 30, generator=generator) for _ in range(3)]
        >>> found = tsv_parts(tasks, 10)
        >>> found
        TsvParts(40x30, ranks 10/10/10, error 5e-07 ok)
        >>> update = tsv_merge(tasks, 10, [1.0, 0.5, -1.0]).matrix
        >>> parts = [part.dense() for part in found.parts]
        >>> torch.allclose(parts[0] + 0.5 * parts[1] - parts[2], update.double(), atol=1e-5)
        True
    """
    tolerance_of(mode)  # or an error
    check_solver(solver)
    numbers = given_ranks(ranks, len(task_matrices), "tsv_parts")
    factored, dense = _one_shape(task_matrices, "tsv_parts")
    if factored:
        merged = merge_factored(factored, numbers, mode=mode)
        update = merged.update
        lefts, rights = torch.split(update.left, [*merged.ranks], dim=1), torch.split(update.right, [*merged.ranks])
        parts = tuple(Factored(*block) for block in zip(lefts, rights, strict=True))
        return TsvParts(parts, merged.ranks, merged.captured_energy, merged.certificate, merged.interference)
    rows, columns = nonzero_support(dense)
    escalations: tuple[str, ...] = ()
    found = None
    if solver == "products":
        try:
            found = parts_by_products(dense, rows, columns, numbers, mode)
        except ConvergenceError as failure:
            escalations = (str(failure),)
    if found is None:
        tall = _tall(dense, rows, columns, workspace)
        padded = [pad_for_rule(rank, min(dense[0].shape)) for rank in numbers]
        merge = merge_by_eigenvalues(tall, padded, [1.0] * len(dense), mode, escalations)
        factors = merge.factors()
        if tall[0].transposed:
            factors = [Factored(part.right.mT, part.left.mT) for part in factors]
        found = TsvParts(tuple(factors), merge.ranks, merge.captured_energy, merge.certificate, merge.interference)
    return replace(found, parts=tuple(_embedded(part, rows, columns, dense[0]) for part in found.parts))


@on_own_device
def tsv_merge_layers(
    layers: Sequence[Sequence[Tensor | Factored]],
    ranks: Sequence[Sequence[Rank] | Rank],
    weights: Sequence[Sequence[float] | Tensor | float] | None = None,
    *,
    mode: Mode = "exact",
    solver: Solver = "eigen",
    workspace: int = WORKSPACE,
) -> list[TsvMerge]:
    """Merge several layers; solver ``products`` merges layers of one shape and number of tasks in one batch.

    A batch uses a GPU fully, which a single small layer does not. Layers that cannot join a batch (rows or columns of
    zeros, rank rules, a result that is not accurate enough) are merged one by one. So are all layers with solver
    ``eigen``.

    Args:
        layers: L lists of task matrices, see `tsv_merge`.
        ranks: for each layer a rank for all tasks, or one for each.
        weights: for each layer a factor for all cores, or one for each; None means 1.
        mode: as for `tsv_merge`.
        solver: as for `tsv_merge`.
        workspace: as for `tsv_merge`.

    Returns:
        L merged layers.

    Raises:
        ShapeError: another number of ranks or weights than layers, or as `tsv_merge`.
        DTypeError, DeviceError, ConfigError, NonFiniteError, ConvergenceError: as `tsv_merge`.

    Examples:
        >>> layers = torch.randn(2, 3, 40, 30, generator=torch.Generator().manual_seed(0))
        >>> [merged.ranks for merged in tsv_merge_layers(layers, [10, 5])]
        [(10, 10, 10), (5, 5, 5)]
    """
    op = "tsv_merge_layers"
    limits = one_for_each_layer(ranks, len(layers), op, "ranks")
    given = one_for_each_layer(weights, len(layers), op, "weights")
    numbers = [given_ranks(own, len(layer), op) for own, layer in zip(limits, layers, strict=True)]
    factors = [given_weights(own, len(layer), op) for own, layer in zip(given, layers, strict=True)]
    check_solver(solver)
    several = solver == "products" and len(layers) > 1
    results = merge_layers_by_products(layers, numbers, factors, mode) if several else {}
    for i, layer in enumerate(layers):
        if i not in results:
            results[i] = tsv_merge(layer, numbers[i], factors[i], mode=mode, solver=solver, workspace=workspace)
    return [results[i] for i in range(len(layers))]


def _one_shape(task_matrices: Sequence[Tensor | Factored], op: str) -> tuple[list[Factored], list[Tensor]]:
    """Return the task matrices as they are if all are factored, and otherwise as dense matrices on one device.

    Raises:
        ShapeError: they are not matrices of one shape.
    """
    shapes = {tuple(getattr(matrix, "shape", ())) for matrix in task_matrices}
    if len(shapes) != 1 or any(len(shape) != 2 for shape in shapes):
        raise ShapeError(f"{op}: expected matrices of one shape, got {sorted(shapes)}")
    factored = [matrix for matrix in task_matrices if isinstance(matrix, Factored)]
    if len(factored) == len(task_matrices):
        return factored, []
    whole = (matrix.dense() if isinstance(matrix, Factored) else matrix for matrix in task_matrices)
    return [], given_matrices(whole, op, one_device=True)


def _tall(dense: Sequence[Tensor], rows: Tensor, columns: Tensor, workspace: int) -> list[TallMatrix]:
    """Return the matrices without the rows and columns in which all of them are zero."""
    whole = (len(rows), len(columns)) == dense[0].shape
    return [
        TallMatrix(matrix if whole else matrix[rows[:, None], columns], len(rows) < len(columns), workspace, len(dense))
        for matrix in dense
    ]


def _embedded(part: Factored, rows: Tensor, columns: Tensor, like: Tensor) -> Factored:
    """Return the summand between all rows and columns of a task matrix."""
    if part.shape == like.shape:
        return part
    (m, n), rank = like.shape, part.left.shape[1]
    left, right = part.left.new_zeros(m, rank), part.right.new_zeros(rank, n)
    left[rows], right[:, columns] = part.left, part.right
    return Factored(left, right)


def _merge_factors(
    matrices: Sequence[Factored], ranks: Sequence[Rank], weights: Sequence[float], mode: Mode
) -> TsvMerge:
    merged = merge_factored(matrices, ranks, weights, mode=mode)
    dtype = torch.float64 if any(matrix.left.dtype == torch.float64 for matrix in matrices) else torch.float32
    update = Factored(merged.update.left.to(dtype), merged.update.right.to(dtype))
    return TsvMerge(
        finite(update.dense(), "tsv_merge"),
        merged.ranks,
        merged.captured_energy,
        merged.certificate,
        merged.interference,
    )
