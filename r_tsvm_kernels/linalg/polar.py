"""The polar factor: the nearest matrix with orthonormal columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConvergenceError
from .certificate import Certificate, Mode, tolerance_of
from .decompositions import eigh, svd
from .subspaces import check_matrices
from .tall_matrix import TallMatrix

# Relative to the largest singular value. Concatenated bases of real fine-tunes have condition numbers up to a few
# thousand; float64 noise lies at 1e-15; nothing meaningful was seen in between.
RANK_TOLERANCE = 1e-6

# Share of the largest eigenvalue of a Gram matrix from which on the relative error of an eigenvalue is below 1e-5.
RESOLVED = 1e-10


@dataclass(frozen=True)
class InverseRoot:
    """``(X^T X)^(-1/2)`` on the range of ``X^T``, 0 on its complement.

    Attributes:
        matrix: (k, k) float64, symmetric; ``X @ matrix`` is the canonical polar factor of X.
        rank: number of singular values of X above the tolerance.
        condition: largest over smallest of these, 1.0 for a zero matrix.
        route: ``gram-float64`` or ``svd-float64``.
    """

    matrix: Tensor
    rank: int
    condition: float
    route: str


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
        rtol: relative tolerance below which a singular value counts as zero.

    Raises:
        ShapeError: not matrices.
        DTypeError: a matrix is not float32 or float64.
        ConfigError: an unknown mode.
        ConvergenceError: no solver succeeded.
    """
    tolerance = tolerance_of(mode)
    check_matrices(matrices, [0] * len(matrices), "polar")
    return [_polar(matrix, rtol, tolerance) for matrix in matrices]


def _polar(matrix: Tensor, rtol: float, tolerance: float) -> PolarFactor:
    tall = TallMatrix(matrix)
    escalations: tuple[str, ...] = ()
    try:
        root = root_of_gram(tall.gram(torch.float64), rtol)
    except ConvergenceError as failure:
        escalations = (str(failure),)
        root = root_of_factor(tall.triangular_factor(), rtol)
    P = torch.cat([tile @ root.matrix for _, tile in tall.tiles(torch.float64)] or [tall.matrix.double()])
    defect = isometry_defect(root, P.mT @ P)
    certificate = Certificate(
        error=defect,
        orthogonality=defect,
        subspace_error=0.0,
        tolerance=tolerance,
        route=root.route,
        escalations=escalations,
    )
    certificate.require()
    return PolarFactor(P.mT if tall.transposed else P, root.rank, root.condition, certificate)


def root_of_gram(gram: Tensor, rtol: float = RANK_TOLERANCE) -> InverseRoot:
    """Return the inverse root of a Gram matrix ``X^T X`` (k, k), float64, by its eigenvalues.

    Raises:
        ConvergenceError: an eigenvalue is neither surely zero nor surely not, or inexact; or the decomposition failed.
    """
    if gram.shape[0] == 0:
        return InverseRoot(gram, 0, 1.0, "gram-float64")
    values, Q = eigh(gram)
    largest = float(values[-1])
    if largest <= 0:
        return InverseRoot(torch.zeros_like(gram), 0, 1.0, "gram-float64")
    rounding = 8 * len(values) ** 0.5 * torch.finfo(gram.dtype).eps
    doubtful = (values > rounding * largest) & (values < max(RESOLVED, 100 * rtol**2) * largest)
    if bool(doubtful.any()) or not float(values[0]) >= -rounding * largest:
        raise ConvergenceError(f"gram-float64: a singular value of the basis is {_smallest(values, doubtful):.0e} of 1")
    return _inverse_root(Q.flip(1), values.flip(0).clamp(min=0).sqrt(), rounding**0.5, "gram-float64")


def root_of_factor(R: Tensor, rtol: float = RANK_TOLERANCE) -> InverseRoot:
    """Return the inverse root of ``R^T R`` by the SVD of R (any number of rows, k columns), float64.

    Raises:
        ConvergenceError: the SVD did not converge.
    """
    _, values, Qh = svd(R)
    return _inverse_root(Qh.mT, values, rtol, "svd-float64")


def isometry_defect(root: InverseRoot, gram: Tensor) -> float:
    """Return the largest entry of ``|P^T P - I|``; for a partial isometry of ``|P^T P P^T P - P^T P|``.

    `gram` is ``P^T P`` (k, k).
    """
    if gram.numel() == 0:
        return 0.0
    full = root.rank == gram.shape[0]
    defect = gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device) if full else gram @ gram - gram
    return float(defect.abs().amax())


def _inverse_root(Q: Tensor, values: Tensor, rtol: float, route: str) -> InverseRoot:
    """Return the inverse root from right singular vectors and singular values, falling."""
    rank = int((values > rtol * values[0]).sum()) if len(values) else 0
    kept = Q[:, :rank]
    condition = float(values[0] / values[rank - 1]) if rank else 1.0
    return InverseRoot((kept / values[:rank]) @ kept.mT, rank, condition, route)


def _smallest(values: Tensor, doubtful: Tensor) -> float:
    return float(values[doubtful].amin() / values[-1]) ** 0.5 if bool(doubtful.any()) else 0.0
