"""The polar factor: the nearest matrix with orthonormal columns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .subspaces import svd

# Relative to the largest singular value. Concatenated bases of real fine-tunes have condition numbers up to a few
# thousand; float64 noise lies at 1e-15; nothing meaningful was seen in between.
RANK_TOLERANCE = 1e-6


@dataclass(frozen=True)
class PolarFactor:
    """The canonical polar factor of a matrix and what was measured on the way.

    Attributes:
        matrix: the input's shape; a partial isometry of rank `rank`.
        rank: number of singular values above the tolerance.
        condition: largest over smallest kept singular value, 1.0 for a zero matrix.
    """

    matrix: Tensor
    rank: int
    condition: float


def polar_factor(matrix: Tensor, rtol: float = RANK_TOLERANCE) -> PolarFactor:
    """Return the canonical polar factor ``P Q^T`` of ``matrix = P S Q^T``.

    With full rank it is the nearest matrix with orthonormal columns (or rows), the solution of the orthogonal
    Procrustes problem used by TSV-Merge (Gargiulo et al., CVPR 2025). Singular values up to ``rtol`` times the
    largest count as zero, and their directions are left out: a partial isometry, whose range is the range of `matrix`.
    Completing it with null vectors would be arbitrary.

    Args:
        matrix: (m, k), float32 or float64; computed in its own dtype.
        rtol: relative tolerance below which a singular value counts as zero.

    Raises:
        ConvergenceError: the decomposition failed.
    """
    if matrix.numel() == 0:
        return PolarFactor(matrix, 0, 1.0)
    P, s, Qh = svd(matrix)
    rank = int((s > rtol * s[0]).sum())
    condition = float(s[0] / s[rank - 1]) if rank else 1.0
    return PolarFactor(P[:, :rank] @ Qh[:rank], rank, condition)
