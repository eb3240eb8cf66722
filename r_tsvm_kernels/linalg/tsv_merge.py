"""TSV-Merge: put the leading subspaces of several task matrices side by side without overlap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ShapeError
from .certificate import Certificate
from .polar import PolarFactor, polar_factor
from .subspaces import leading_subspaces

TOLERANCE = 1e-9


@dataclass(frozen=True)
class TsvMerge:
    """The merged update and what was measured on the way.

    Attributes:
        matrix: (m, n) merged update in the dtype of the task matrices.
        ranks: rank used per task: what was asked for, clipped to the numerical rank.
        captured_energy: per task, fraction of the squared Frobenius norm inside the subspaces that were kept.
        certificate: measured orthogonality and residual.
    """

    matrix: Tensor
    ranks: tuple[int, ...]
    captured_energy: tuple[float, ...]
    certificate: Certificate


def tsv_merge(
    task_matrices: Sequence[Tensor], ranks: Sequence[int], weights: Sequence[float] | None = None
) -> TsvMerge:
    """Merge task matrices by TSV-Merge (Gargiulo et al., "Task Singular Vectors", CVPR 2025), in float64.

    The leading `ranks[t]` left and right subspaces of each task are concatenated to ``U`` and ``V``, both are replaced
    by their canonical polar factor, and the weighted cores go in between:
    ``polar(U) @ blockdiag(w_t * core_t) @ polar(V)^T``. Rows and columns in which every task matrix is zero are
    exactly zero in the result.

    Args:
        task_matrices: T matrices (m, n), float32 or float64, finite, on one device.
        ranks: T ranks >= 0; their sum should not exceed min(m, n), or the bases cannot become orthonormal.
        weights: T factors of the cores; None means 1.

    Raises:
        ShapeError: the matrices, ranks and weights do not match.
        ConvergenceError: a decomposition failed, or the result missed its certificate.
    """
    factors = [1.0] * len(task_matrices) if weights is None else list(weights)
    shapes = {tuple(matrix.shape) for matrix in task_matrices}
    if len(shapes) != 1 or any(len(shape) != 2 for shape in shapes):
        raise ShapeError(f"tsv_merge: expected matrices of one shape, got {sorted(shapes)}")
    if not len(task_matrices) == len(ranks) == len(factors):
        raise ShapeError(f"tsv_merge: {len(task_matrices)} matrices, {len(ranks)} ranks, {len(factors)} weights")

    # Nothing may leak into rows and columns that no task touched; leaving them out also makes the solve smaller.
    touched = torch.stack([matrix != 0 for matrix in task_matrices]).any(0)
    rows, columns = touched.any(1).nonzero()[:, 0], touched.any(0).nonzero()[:, 0]
    parts = [
        leading_subspaces(matrix[rows][:, columns], rank) for matrix, rank in zip(task_matrices, ranks, strict=True)
    ]

    left = polar_factor(torch.cat([part.U for part in parts], dim=1))
    right = polar_factor(torch.cat([part.Vh for part in parts], dim=0))
    core: Tensor = torch.block_diag(  # type: ignore[no-untyped-call]
        *(weight * part.core for weight, part in zip(factors, parts, strict=True))
    )
    update = left.matrix @ core @ right.matrix

    certificate = Certificate(
        orthogonality=max(_isometry_defect(factor) for factor in (left, right)),
        residual=max(part.residual for part in parts),
        tolerance=TOLERANCE,
        route="svd-float64",
        basis_rank=(left.rank, right.rank),
        basis_condition=(left.condition, right.condition),
    )
    certificate.require()
    matrix = torch.zeros_like(task_matrices[0])
    matrix[rows[:, None], columns] = update.to(matrix.dtype)
    return TsvMerge(
        matrix, tuple(part.rank for part in parts), tuple(part.captured_energy for part in parts), certificate
    )


def _isometry_defect(factor: PolarFactor) -> float:
    """Return the largest entry of ``|Q^T Q - I|``, or of ``|P P^T P - P|`` for a partial isometry."""
    P = factor.matrix if factor.matrix.shape[0] >= factor.matrix.shape[1] else factor.matrix.mT
    if P.numel() == 0:
        return 0.0
    gram = P.mT @ P
    if factor.rank == gram.shape[0]:
        return float((gram - torch.eye(factor.rank, dtype=P.dtype, device=P.device)).abs().amax())
    return float((P @ gram - P).abs().amax())
