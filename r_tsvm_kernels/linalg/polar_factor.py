"""The polar factor: the nearest matrix with orthonormal columns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError, ConvergenceError
from .arguments import finite_number, given_matrices
from .certificate import Certificate, Mode, tolerance_of
from .inverse_root import RANK_TOLERANCE, InverseRoot, root_of_factor, root_of_gram
from .rounding import BACKWARD_ERROR
from .tall_matrix import TallMatrix


@dataclass(frozen=True)
class PolarFactor:
    """The canonical polar factor of a matrix and what was measured on the way.

    Attributes:
        matrix: float64, the input's shape; a partial isometry of rank `rank`.
        rank: number of singular values above the tolerance.
        condition: largest over smallest kept singular value, 1.0 for a zero matrix.
        certificate: its error is the defect of orthonormality.
    """

    matrix: Tensor
    rank: int
    condition: float
    certificate: Certificate


def polar(matrices: Sequence[Tensor] | Tensor, mode: Mode = "exact", rtol: float = RANK_TOLERANCE) -> list[PolarFactor]:
    """Return the canonical polar factor ``P Q^T`` of each matrix ``P S Q^T``.

    With full rank it is the nearest matrix with orthonormal columns (or rows), the solution of the orthogonal
    Procrustes problem used by TSV-Merge (Gargiulo et al., CVPR 2025). Singular values up to ``rtol`` times the
    largest count as zero, and their directions are left out: a partial isometry, whose range is the range of the
    matrix. Completing it with null vectors would be arbitrary.

    Args:
        matrices: matrices (m, n) of any shapes, or one stacked tensor (batch, m, n); float32 or float64, finite.
        mode: ``exact`` or ``fast``, see `Certificate`.
        rtol: in [0, 1); relative tolerance up to which a singular value counts as zero.

    Raises:
        ShapeError: not matrices.
        DTypeError: a matrix is not a dense tensor of float32 or float64.
        ConfigError: an unknown mode, or `rtol` out of range.
        NonFiniteError: a matrix holds NaN or infinity.
        ConvergenceError: no solver succeeded.
    """
    tolerance = tolerance_of(mode)
    if not 0 <= finite_number(rtol, "polar: rtol") < 1:
        raise ConfigError(f"polar: rtol must be in [0, 1), got {rtol}")
    return [_polar(matrix, float(rtol), tolerance) for matrix in given_matrices(matrices, "polar")]


def _polar(matrix: Tensor, rtol: float, tolerance: float) -> PolarFactor:
    tall = TallMatrix(matrix)
    escalations: tuple[str, ...] = ()
    try:
        root = root_of_gram(tall.gram(torch.float64), rtol)
    except ConvergenceError as failure:
        escalations = (str(failure),)
        root = root_of_factor(tall.triangular_factor(), rtol)
    P = torch.cat([root.matrix.after(tile) for _, tile in tall.tiles(torch.float64)] or [tall.matrix.double()])
    defect = isometry_defect(root, P.mT @ P)
    certificate = Certificate(
        error=defect + root.rounding,
        orthogonality=defect,
        subspace_error=0.0,
        tolerance=tolerance,
        route=root.route,
        basis_rank=(root.rank, root.rank),
        basis_condition=(root.condition, root.condition),
        arbitrary=root.margin <= BACKWARD_ERROR,
        escalations=escalations,
    )
    certificate.require()
    return PolarFactor(P.mT if tall.transposed else P, root.rank, root.condition, certificate)


def isometry_defect(root: InverseRoot, gram: Tensor) -> float:
    """Return ``norm(P^T P - I) / sqrt(rank)`` (Frobenius); for a partial isometry ``norm(P^T P P^T P - P^T P)`` in it.

    `gram` is ``P^T P`` (k, k). As the inverse root is symmetric, the polar factor is no further from the exact one,
    relatively, but for its null space.
    """
    if root.rank == 0:
        return 0.0
    full = root.rank == gram.shape[0]
    defect = gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device) if full else gram @ gram - gram
    return float(torch.linalg.vector_norm(defect)) / math.sqrt(root.rank)
