"""Merge task matrices by weighted orthogonalisation: directions of large singular values move least."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import ConfigError, ShapeError
from ..text import kind_of
from .arguments import finite, finite_number, given_matrices, given_ranks, given_weights, nonzero_support
from .certificate import Certificate, Mode, tolerance_of
from .factored import Factored, check_factored
from .joint_spaces import core_space
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


def weighted_merge(
    task_matrices: Sequence[Tensor | Factored],
    weights: Sequence[float] | Tensor | float | None = None,
    *,
    power: float = 1.0,
    ranks: Sequence[Rank] | Rank | None = None,
    mode: Mode = "exact",
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
        workspace: bytes for copies of matrix rows on rectangles.

    Returns:
        The merged update (m, n), with what is retained of each task, and the certificate.

    Raises:
        ShapeError: the matrices, ranks and weights do not match, or a rank is negative.
        DTypeError: a matrix is not a dense tensor of float32 or float64.
        DeviceError: the matrices are not on one device.
        ConfigError: an unknown mode, a negative power, a rank that is not a whole number, or a weight that is not
            finite.
        NonFiniteError: a matrix holds NaN or infinity, or the merged one overflows its dtype.
        ConvergenceError: no solver reached the tolerance of `mode`.

    Examples:
        >>> generator = torch.Generator().manual_seed(0)
        >>> tasks = [torch.randn(40, 30, generator=generator) for _ in range(3)]
        >>> weighted_merge(tasks)
        WeightedMerge(40x30 float32, retained from ..., error ... ok)
    """
    tolerance_of(mode)  # or an error
    power = finite_number(power, "weighted_merge: power")
    if power < 0:
        raise ConfigError(f"weighted_merge: power must be >= 0, got {power}")
    count = len(task_matrices)
    factors = given_weights(weights, count, "weighted_merge")
    limits = None if ranks is None else given_ranks(ranks, count, "weighted_merge")
    shapes = {tuple(getattr(matrix, "shape", ())) for matrix in task_matrices}
    if len(shapes) != 1 or any(len(shape) != 2 for shape in shapes):
        raise ShapeError(f"weighted_merge: expected matrices of one shape, got {sorted(shapes)}")
    options = _Options(power, limits, mode, workspace)
    if all(isinstance(matrix, Factored) for matrix in task_matrices):
        return _merge_factors([matrix for matrix in task_matrices if isinstance(matrix, Factored)], factors, options)
    dense = given_matrices(
        (matrix.dense() if isinstance(matrix, Factored) else matrix for matrix in task_matrices),
        "weighted_merge",
        one_device=True,
    )
    rows, columns = nonzero_support(dense)
    shape = len(rows), len(columns)
    whole = shape == dense[0].shape
    update = torch.zeros_like(dense[0]) if whole else dense[0].new_zeros(shape)
    parts = dense if whole else [matrix[rows[:, None], columns] for matrix in dense]
    found = _merge(parts, factors, shape, options, update)
    result = update
    if not whole:
        result = torch.zeros_like(dense[0])
        result[rows[:, None], columns] = update
    return WeightedMerge(finite(result, "weighted_merge"), found.ranks, found.retained, found.certificate)


@dataclass(frozen=True)
class _Options:
    """What `weighted_merge` was given: q, the largest ranks, mode and workspace."""

    power: float
    ranks: list[Rank] | None
    mode: Mode
    workspace: int


def _merge(
    parts: Sequence[Tensor], weights: Sequence[float], shape: tuple[int, int], options: _Options, target: Tensor
) -> WeightedSum:
    """Write the merged matrix to `target`; zero task matrices and their weights are left out.

    Args:
        parts: T matrices without common zero rows or columns, or cores of them.
        weights: T factors.
        shape: of the task matrices without such rows or columns; decides which side is the short one.
        options: of the merge.
        target: of the shape of the parts.
    """
    tall = [TallMatrix(part, shape[0] < shape[1], options.workspace) for part in parts]
    live = [index for index, matrix in enumerate(tall) if matrix.squared_norm]
    single = len(live) < 2 and options.ranks is None
    if single or not live:  # nothing to be made orthogonal to
        for index in live:
            target.copy_(parts[index] * weights[index])
        eps = torch.finfo(target.dtype).eps
        found = WeightedSum((), (), Certificate(eps, 0.0, 0.0, tolerance_of(options.mode), "copy"))
        size = min(shape)
        return replace(
            found, ranks=tuple(size if t in live else 0 for t in range(len(parts))), retained=(1.0,) * len(parts)
        )
    limits = options.ranks and [pad_for_rule(options.ranks[index], min(shape)) for index in live]
    found = merge_weighted(
        [tall[index] for index in live],
        [weights[index] for index in live],
        target.mT if shape[0] < shape[1] else target,
        power=options.power,
        ranks=limits,
        lead=None if long_side_is_whole(shape, len(live)) else -(-min(shape) // len(live)),
        mode=options.mode,
    )
    ranks, retained = dict(zip(live, found.ranks, strict=True)), dict(zip(live, found.retained, strict=True))
    every = range(len(parts))
    return replace(
        found, ranks=tuple(ranks.get(t, 0) for t in every), retained=tuple(retained.get(t, 1.0) for t in every)
    )


def _merge_factors(matrices: Sequence[Factored], weights: Sequence[float], options: _Options) -> WeightedMerge:
    """Merge the cores of products in common bases."""
    check_factored(matrices, "weighted_merge")
    space = core_space(matrices)
    shape = int(space.left.any(1).sum()), int(space.right.any(0).sum())
    core = torch.zeros_like(space.cores[0])
    found = _merge(space.cores, weights, shape, options, core)
    dtype = torch.float64 if any(matrix.left.dtype == torch.float64 for matrix in matrices) else torch.float32
    result = ((space.left @ core) @ space.right).to(dtype)
    certificate = found.certificate.rounded(dtype)
    certificate = replace(certificate, error=certificate.error + space.error)
    certificate.require()
    return WeightedMerge(finite(result, "weighted_merge"), found.ranks, found.retained, certificate)
