"""Merge task matrices by weighted orthogonalisation: directions of large singular values move least."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import ConfigError, ConvergenceError, ShapeError
from ..foreign_devices import on_own_device
from ..text import kind_of
from .arguments import (
    finite,
    finite_number,
    given_matrices,
    given_ranks,
    given_weights,
    nonzero_support,
    one_for_each_layer,
)
from .certificate import Certificate, Mode, tolerance_of
from .factored import Factored, check_factored
from .joint_spaces import core_space
from .merging import Solver, check_solver
from .products.layers import batches_of_layers
from .products.weighted import weighted_sums_by_products
from .ranks import Rank, pad_for_rule
from .tall_matrix import WORKSPACE, TallMatrix
from .weighted_eigen import WeightedSum, merge_weighted


@dataclass(frozen=True, repr=False)
class WeightedMerge:
    """The merged update and what was measured on the way.

    Attributes:
        matrix: (m, n) merged update in the dtype of the task matrices; float32 for 16-bit factors.
        ranks: per task, the number of directions that were orthogonalised on both sides; 0 for a zero matrix.
        retained: per task, ``<sum_s M_s, D_t> / |D_t|^2`` (Frobenius): 1.0 if the merge at weights 1 keeps all of the
            task, less if orthogonalisation took some; 1.0 for a zero matrix.
        certificate: measured accuracy.
    """

    matrix: Tensor
    ranks: tuple[int, ...]
    retained: tuple[float, ...]
    certificate: Certificate

    def __repr__(self) -> str:
        lowest = min(self.retained, default=1.0)
        return f"WeightedMerge({kind_of(self.matrix)}, retained from {lowest:.2f}, {self.certificate.verdict})"


@dataclass(frozen=True, repr=False)
class WeightedParts:
    """The summands of a merge by weighted orthogonalisation, one for each task, and what was measured on the way.

    Attributes:
        parts: M_t of each task, (m, n); factored, in float64, if all task matrices are.
        ranks: as in `WeightedMerge`.
        retained: as in `WeightedMerge`.
        certificate: of the merge with weights 1.
    """

    parts: tuple[Tensor | Factored, ...]
    ranks: tuple[int, ...]
    retained: tuple[float, ...]
    certificate: Certificate

    def __repr__(self) -> str:
        m, n = self.parts[0].shape
        lowest = min(self.retained, default=1.0)
        return (
            f"WeightedParts({m}x{n}, {len(self.parts)} tasks, retained from {lowest:.2f}, {self.certificate.verdict})"
        )


def long_side_is_whole(shape: tuple[int, int], tasks: int) -> bool:
    """Whether `weighted_merge` orthogonalises the long side as a whole.

    Decomposing its Gram matrix then takes no more operations than decomposing one of the short side for each task.

    Args:
        shape: (m, n) of the task matrices.
        tasks: T, the number of task matrices.

    Examples:
        >>> long_side_is_whole((4096, 4096), 3), long_side_is_whole((14336, 4096), 3)
        (True, False)
    """
    return max(shape) ** 3 <= tasks * min(shape) ** 3


@on_own_device
def weighted_merge(
    task_matrices: Sequence[Tensor | Factored],
    weights: Sequence[float] | Tensor | float | None = None,
    *,
    power: float = 1.0,
    ranks: Sequence[Rank] | Rank | None = None,
    mode: Mode = "exact",
    solver: Solver = "eigen",
    workspace: int = WORKSPACE,
) -> WeightedMerge:
    """Merge task matrices by TSV-Merge with a weighted orthogonalisation.

    With the thin SVD ``D_t = U_t diag(s_t) V_t^T``, ``n_t = |D_t|`` (Frobenius) and a power q, the singular vectors
    enter the polar factors scaled by ``(s_t / n_t)^q``, so that those of large singular values move least::

        [P_1 .. P_T] = polar([U_1 diag((s_1 / n_1)^q) .. U_T diag((s_T / n_T)^q)]),   Q_t in the same way from V_t
        M_t = P_t diag(s_t) Q_t^T,   merged = sum_t w_t M_t

    With q = 0 and ranks ``min(m, n) // T`` this is TSV-Merge (Gargiulo et al., CVPR 2025, algorithm 1). With q = 1,
    all ranks and both sides whole it needs no SVD of any task: ``M_t = L^(-1/2) (D_t D_t^T D_t / n_t^2) R^(-1/2)`` with
    ``L = sum_t D_t D_t^T / n_t^2`` and ``R = sum_t D_t^T D_t / n_t^2``. The weighting is our own extension.

    The polar factor of the long side of a rectangle would be larger than all other decompositions. Unless
    `long_side_is_whole`, only the ``ceil(min(m, n) / T)`` leading directions of each task are orthogonalised on both
    sides, and the others on the short side alone. For D_t with m >= n, leading vectors V_k and
    ``F_t = V_t diag((s_t / n_t)^(2 q)) V_t^T`` these add ``D_t (I - V_k V_k^T) F_t R^-1`` to M_t.

    Without limits of the ranks, one task, or equal ones, give the task matrix back, and tasks in different rows and
    columns are kept as they are. A zero matrix changes nothing. Rows and columns in which every task matrix is zero
    stay exactly zero. Singular values of the concatenated vectors up to 1e-6 of the largest count as zero, see `polar`.

    Args:
        task_matrices: T matrices (m, n), as a list or a tensor (T, m, n); float32 or float64, finite, on one device. Or
            T `Factored` matrices, such as LoRA updates, which are merged without forming a task matrix.
        weights: factor of each M_t: one for all tasks, or one for each; None means 1. The update is linear in them.
        power: q >= 0.
        ranks: largest rank of each task, or a function of the singular values (see `choose_rank`): one for all tasks,
            or one for each; None keeps all directions.
        mode: ``exact`` or ``fast``, see `Certificate`.
        solver: ``eigen``: eigenvalues of Gram matrices. ``products``: matrix products on tensor cores; simulated and
            slow on a CPU. ``products`` falls back to ``eigen`` if its estimated error is too large, if q is not 1 or
            the ranks are limited, and for `Factored` matrices.
        workspace: bytes for copies of matrix rows on rectangles.

    Returns:
        The merged update (m, n), with what is retained of each task, and the certificate.

    Raises:
        ShapeError: the matrices, ranks and weights do not match, or a rank is negative.
        DTypeError: a matrix is not a dense tensor of float32 or float64.
        DeviceError: the matrices are not on one device.
        ConfigError: an unknown mode or solver, a negative power, a rank that is not a whole number, or a weight that is
            not finite.
        NonFiniteError: a matrix holds NaN or infinity, or the merged one overflows its dtype.
        ConvergenceError: no solver reached the tolerance of `mode`.

    Examples:
        >>> generator = torch.Generator().manual_seed(0)
        >>> tasks = [torch.randn(40, 30, generator=generator) for _ in range(3)]
        >>> weighted_merge(tasks)
        WeightedMerge(40x30 float32, retained from ..., error ... ok)
    """
    count = len(task_matrices)
    factors = given_weights(weights, count, "weighted_merge")
    limits = None if ranks is None else given_ranks(ranks, count, "weighted_merge")
    options = _Options.given(power, limits, mode, solver, workspace)
    matrix, _, found = _merged(task_matrices, factors, options, "weighted_merge")
    return WeightedMerge(matrix, found.ranks, found.retained, found.certificate)


def weighted_parts(
    task_matrices: Sequence[Tensor | Factored],
    *,
    power: float = 1.0,
    ranks: Sequence[Rank] | Rank | None = None,
    mode: Mode = "exact",
    solver: Solver = "eigen",
    workspace: int = WORKSPACE,
) -> WeightedParts:
    """Return the summands M_t of a merge by weighted orthogonalisation, one for each task.

    They do not depend on the weights: ``sum_t w_t M_t`` is `weighted_merge` with the weights w_t.

    Args:
        task_matrices: as for `weighted_merge`.
        power: as for `weighted_merge`.
        ranks: as for `weighted_merge`.
        mode: as for `weighted_merge`.
        solver: as for `weighted_merge`.
        workspace: as for `weighted_merge`.

    Returns:
        T matrices (m, n), factored if the task matrices are, with what is retained of each task, and the certificate.

    Raises:
        ShapeError, DTypeError, DeviceError, ConfigError, NonFiniteError, ConvergenceError: as `weighted_merge`.

    Examples:
        >>> generator = torch.Generator().manual_seed(0)
        >>> tasks = [torch.randn(40, 30, generator=generator) for _ in range(2)]
        >>> first, second = weighted_parts(tasks).parts
        >>> torch.allclose(first - 0.5 * second, weighted_merge(tasks, [1.0, -0.5]).matrix, atol=1e-5)
        True
    """
    limits = None if ranks is None else given_ranks(ranks, len(task_matrices), "weighted_parts")
    options = _Options.given(power, limits, mode, solver, workspace)
    ones = [1.0] * len(task_matrices)
    _, parts, found = _merged(task_matrices, ones, options, "weighted_parts", apart=True)
    return WeightedParts(parts, found.ranks, found.retained, found.certificate)


@on_own_device
def weighted_merge_layers(
    layers: Sequence[Sequence[Tensor | Factored]],
    weights: Sequence[Sequence[float] | Tensor | float] | None = None,
    *,
    power: float = 1.0,
    ranks: Sequence[Sequence[Rank] | Rank | None] | None = None,
    mode: Mode = "exact",
    solver: Solver = "eigen",
    workspace: int = WORKSPACE,
) -> list[WeightedMerge]:
    """Merge several layers; solver ``products`` merges layers of one shape and number of tasks in one batch.

    Layers that cannot join a batch (rows, columns or tasks of zeros, a result that is not accurate enough) are merged
    one by one. So are all layers with solver ``eigen``.

    Args:
        layers: L lists of task matrices, see `weighted_merge`.
        weights: for each layer a factor for all M_t, or one for each; None means 1.
        power: as for `weighted_merge`.
        ranks: for each layer, as for `weighted_merge`; None limits none.
        mode: as for `weighted_merge`.
        solver: as for `weighted_merge`.
        workspace: as for `weighted_merge`.

    Returns:
        L merged layers.

    Raises:
        ShapeError: another number of weights or ranks than layers, or as `weighted_merge`.
        DTypeError, DeviceError, ConfigError, NonFiniteError, ConvergenceError: as `weighted_merge`.

    Examples:
        >>> layers = torch.randn(2, 3, 40, 30, generator=torch.Generator().manual_seed(0))
        >>> [merged.ranks for merged in weighted_merge_layers(layers)]
        [(30, 30, 30), (30, 30, 30)]
    """
    op = "weighted_merge_layers"
    given = one_for_each_layer(weights, len(layers), op, "weights")
    limits = one_for_each_layer(ranks, len(layers), op, "ranks")
    options = _Options.given(power, None, mode, solver, workspace)
    factors = [given_weights(own, len(layer), op) for own, layer in zip(given, layers, strict=True)]
    results: dict[int, WeightedMerge] = {}
    together = options.by_products and len(layers) > 1
    for group, batch in batches_of_layers(layers, op, lambda i: limits[i] is None) if together else ():
        if bool(batch.flatten(2).any(-1).all()):
            lead = _lead((batch.shape[-2], batch.shape[-1]), batch.shape[1])
            merges = weighted_sums_by_products(batch, [factors[i] for i in group], lead, mode)
            results |= {
                i: WeightedMerge(finite(matrix, op), found.ranks, found.retained, found.certificate)
                for i, (matrix, _, found) in zip(group, merges, strict=True)
                if found.certificate.met  # the others are merged alone, and report the failure
            }
    for i, layer in enumerate(layers):
        if i not in results:
            results[i] = weighted_merge(
                layer, factors[i], power=power, ranks=limits[i], mode=mode, solver=solver, workspace=workspace
            )
    return [results[i] for i in range(len(layers))]


@dataclass(frozen=True)
class _Options:
    """What `weighted_merge` was given: q, the largest ranks, mode, solver and workspace."""

    power: float
    ranks: list[Rank] | None
    mode: Mode
    solver: Solver
    workspace: int

    @classmethod
    def given(cls, power: float, ranks: list[Rank] | None, mode: Mode, solver: Solver, workspace: int) -> _Options:
        """Check the options."""
        tolerance_of(mode)  # or an error
        check_solver(solver)
        power = finite_number(power, "weighted_merge: power")
        if power < 0:
            raise ConfigError(f"weighted_merge: power must be >= 0, got {power}")
        return cls(power, ranks, mode, solver, workspace)

    @property
    def by_products(self) -> bool:
        """Whether solver ``products`` is wanted, and can merge with these options."""
        return self.solver == "products" and self.power == 1 and self.ranks is None


def _lead(shape: tuple[int, int], tasks: int) -> int | None:
    """Return the number of directions of each task that are orthogonalised on both sides, None for all."""
    return None if long_side_is_whole(shape, tasks) else -(-min(shape) // tasks)


def _merged(
    task_matrices: Sequence[Tensor | Factored],
    weights: Sequence[float],
    options: _Options,
    op: str,
    *,
    apart: bool = False,
) -> tuple[Tensor, tuple[Tensor | Factored, ...], WeightedSum]:
    """Return the merged matrix, each M_t if they are wanted `apart`, and what was measured.

    Raises:
        ShapeError: the task matrices are not matrices of one shape.
    """
    shapes = {tuple(getattr(matrix, "shape", ())) for matrix in task_matrices}
    if len(shapes) != 1 or any(len(shape) != 2 for shape in shapes):
        raise ShapeError(f"{op}: expected matrices of one shape, got {sorted(shapes)}")
    if all(isinstance(matrix, Factored) for matrix in task_matrices):
        factored = [matrix for matrix in task_matrices if isinstance(matrix, Factored)]
        return _merge_factors(factored, weights, options, op, apart)
    dense = given_matrices(
        (matrix.dense() if isinstance(matrix, Factored) else matrix for matrix in task_matrices), op, one_device=True
    )
    rows, columns = nonzero_support(dense)
    shape = len(rows), len(columns)
    whole = shape == dense[0].shape
    matrices = dense if whole else [matrix[rows[:, None], columns] for matrix in dense]
    update, *parts = (torch.zeros_like(matrices[0]) for _ in range(1 + apart * len(dense)))
    found = _merge(matrices, weights, shape, options, update, parts)

    def embedded(matrix: Tensor) -> Tensor:
        if whole:
            return finite(matrix, op)
        result = torch.zeros_like(dense[0])
        result[rows[:, None], columns] = matrix
        return finite(result, op)

    return embedded(update), tuple(map(embedded, parts)), found


def _merge(
    matrices: Sequence[Tensor],
    weights: Sequence[float],
    shape: tuple[int, int],
    options: _Options,
    target: Tensor,
    parts: Sequence[Tensor] = (),
) -> WeightedSum:
    """Write the merged matrix to `target`; zero task matrices and their weights are left out.

    Args:
        matrices: T matrices without common zero rows or columns, or cores of them.
        weights: T factors.
        shape: of the task matrices without such rows or columns; decides which side is the short one.
        options: of the merge.
        target: of the shape of the matrices.
        parts: T matrices of zeros that each M_t is written to, or none.
    """
    tall = [TallMatrix(matrix, shape[0] < shape[1], options.workspace) for matrix in matrices]
    live = [index for index, matrix in enumerate(tall) if matrix.squared_norm]
    single = len(live) < 2 and options.ranks is None
    if single or not live:  # nothing to be made orthogonal to
        for index in live:
            target.copy_(matrices[index] * weights[index])
            if parts:
                parts[index].copy_(matrices[index])
        eps = torch.finfo(target.dtype).eps
        found = WeightedSum((), (), Certificate(eps, 0.0, 0.0, tolerance_of(options.mode), "copy"))
        size = min(shape)
        return replace(
            found, ranks=tuple(size if t in live else 0 for t in range(len(tall))), retained=(1.0,) * len(tall)
        )
    own = replace(options, ranks=options.ranks and [options.ranks[t] for t in live])
    found = _solve(
        [tall[t] for t in live], [weights[t] for t in live], shape, own, target, [parts[t] for t in live if parts]
    )
    ranks, retained = dict(zip(live, found.ranks, strict=True)), dict(zip(live, found.retained, strict=True))
    every = range(len(tall))
    return replace(
        found, ranks=tuple(ranks.get(t, 0) for t in every), retained=tuple(retained.get(t, 1.0) for t in every)
    )


def _solve(
    tall: Sequence[TallMatrix],
    weights: Sequence[float],
    shape: tuple[int, int],
    options: _Options,
    target: Tensor,
    parts: Sequence[Tensor],
) -> WeightedSum:
    """Write the merged matrix of tasks that are not zero to `target`, by the solver that was asked for or by ``eigen``.

    Args:
        tall: T matrices.
        weights: T factors.
        shape: as for `_merge`.
        options: of the merge.
        target: as for `_merge`.
        parts: as for `_merge`.
    """
    lead = _lead(shape, len(tall))
    escalations: tuple[str, ...] = ()
    if options.solver == "products":
        try:
            if not options.by_products:
                raise ConvergenceError("products: needs power 1 and no limits of the ranks")
            layers = torch.stack([part.matrix.mT if part.transposed else part.matrix for part in tall])[None]
            ((merged, own, found),) = weighted_sums_by_products(
                layers, [weights], lead, options.mode, keep_parts=bool(parts)
            )
            found.certificate.require()
            target.copy_(merged)
            for part, values in zip(parts, own, strict=True):
                part.copy_(values)
            return found
        except ConvergenceError as failure:
            escalations = (str(failure),)
    found = merge_weighted(
        tall,
        weights,
        target.mT if shape[0] < shape[1] else target,
        power=options.power,
        ranks=options.ranks and [pad_for_rule(rank, min(shape)) for rank in options.ranks],
        lead=lead,
        mode=options.mode,
        parts=[part.mT if shape[0] < shape[1] else part for part in parts],
    )
    reasons = (*escalations, *found.certificate.escalations)
    return replace(found, certificate=replace(found.certificate, escalations=reasons))


def _merge_factors(
    matrices: Sequence[Factored], weights: Sequence[float], options: _Options, op: str, apart: bool
) -> tuple[Tensor, tuple[Factored, ...], WeightedSum]:
    """Merge the cores of products in common bases."""
    check_factored(matrices, op)
    space = core_space(matrices)
    shape = int(space.left.any(1).sum()), int(space.right.any(0).sum())
    core, *parts = (torch.zeros_like(space.cores[0]) for _ in range(1 + apart * len(matrices)))
    found = _merge(space.cores, weights, shape, replace(options, solver="eigen"), core, parts)
    dtype = torch.float64 if any(matrix.left.dtype == torch.float64 for matrix in matrices) else torch.float32
    result = finite(((space.left @ core) @ space.right).to(dtype), op)
    certificate = found.certificate.rounded(dtype)
    certificate = replace(certificate, error=certificate.error + space.error)
    certificate.require()
    summands = tuple(Factored(finite(space.left @ part, op), space.right) for part in parts)
    return result, summands, replace(found, certificate=certificate)
