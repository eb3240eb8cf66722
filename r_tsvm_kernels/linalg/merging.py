"""TSV-Merge: put the leading subspaces of several task matrices side by side without overlap."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..errors import ConfigError, ConvergenceError, ShapeError
from .arguments import finite, given_matrices, given_ranks, given_weights, nonzero_support
from .certificate import Mode, tolerance_of
from .eigen_merge import merge_by_eigenvalues
from .factored import Factored, merge_factored
from .merge_result import TsvMerge
from .products.layers import merge_by_products, merge_layers_by_products
from .ranks import Rank
from .tall_matrix import WORKSPACE, TallMatrix

Solver = Literal["eigen", "products"]


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
        return _merge_factors(factored, numbers, factors, mode)
    dense = given_matrices(
        (matrix.dense() if isinstance(matrix, Factored) else matrix for matrix in task_matrices),
        "tsv_merge",
        one_device=True,
    )

    rows, columns = nonzero_support(dense)
    whole = (len(rows), len(columns)) == dense[0].shape
    tall = [
        TallMatrix(matrix if whole else matrix[rows[:, None], columns], len(rows) < len(columns), workspace)
        for matrix in dense
    ]
    escalations: tuple[str, ...] = ()
    if solver == "products":
        try:
            return merge_by_products(dense, rows, columns, numbers, factors, mode)
        except ConvergenceError as failure:
            escalations = (str(failure),)
    padded = [_pad_for_rule(rank, min(dense[0].shape)) for rank in numbers]
    merge = merge_by_eigenvalues(tall, padded, factors, mode, escalations)

    result = torch.zeros_like(dense[0])
    update = result if whole else result.new_zeros(len(rows), len(columns))
    merge.write(update.mT if tall[0].transposed else update)
    if not whole:
        result[rows[:, None], columns] = update
    return TsvMerge(
        finite(result, "tsv_merge"), merge.ranks, merge.captured_energy, merge.certificate, merge.interference
    )


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
        ShapeError, DTypeError, DeviceError, ConfigError, ConvergenceError: as `tsv_merge`.
    """
    if len(layers) != len(ranks) or (weights is not None and len(weights) != len(layers)):
        raise ShapeError(f"tsv_merge_layers: {len(layers)} layers, ranks for {len(ranks)}, or weights for others")
    op = "tsv_merge_layers"
    numbers = [given_ranks(own, len(layer), op) for own, layer in zip(ranks, layers, strict=True)]
    all_weights: Sequence[Any] = [None] * len(layers) if weights is None else weights
    factors = [given_weights(own, len(layer), op) for own, layer in zip(all_weights, layers, strict=True)]
    results = merge_layers_by_products(layers, numbers, factors, mode) if solver == "products" else {}
    for i, layer in enumerate(layers):
        if i not in results:
            results[i] = tsv_merge(layer, numbers[i], factors[i], mode, solver=solver, workspace=workspace)
    return [results[i] for i in range(len(layers))]


def _pad_for_rule(rank: Rank, count: int) -> Rank:
    """Pad the singular values that a rank rule sees with the zeros of the rows and columns that were left out."""
    if isinstance(rank, int):
        return rank
    return lambda values: rank(torch.cat([values, values.new_zeros(count - len(values))]))


def _merge_factors(
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
