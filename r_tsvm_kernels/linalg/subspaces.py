"""Leading singular subspaces of one task matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConvergenceError, ShapeError


@dataclass(frozen=True)
class Subspaces:
    """Leading singular subspaces and what the matrix does between them: ``D ~ U @ core @ Vh``.

    Attributes:
        U: (m, k) float64, orthonormal columns.
        core: (k, k) float64, ``U^T D V``; with `U` and `Vh` determined up to a rotation within each subspace.
        Vh: (k, n) float64, orthonormal rows.
        captured_energy: ``norm(core)^2 / norm(D)^2`` (Frobenius), 1.0 for a zero matrix.
        residual: ``norm(D V - U core) / norm(D)`` (Frobenius), 0.0 for a zero matrix.
    """

    U: Tensor
    core: Tensor
    Vh: Tensor
    captured_energy: float
    residual: float

    @property
    def rank(self) -> int:
        """Dimension of the subspaces, at most the rank that was asked for."""
        return self.core.shape[0]


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the thin SVD; a LAPACK or cuSOLVER failure becomes a `ConvergenceError`."""
    try:
        U, s, Vh = torch.linalg.svd(matrix, full_matrices=False)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise ConvergenceError(f"the SVD of a {tuple(matrix.shape)} matrix did not converge: {error}") from error
    return U, s, Vh


def rank_tolerance(matrix: Tensor) -> float:
    """Return the singular value below which a direction of `matrix` counts as zero, in the units of the matrix.

    ``eps * norm(matrix)`` (Frobenius) with eps of the matrix's dtype: rounding every element to that dtype moves no
    singular value by more than half of it (Weyl). For float64 the SVD's own backward error is larger and decides.
    """
    eps = max(torch.finfo(matrix.dtype).eps, 2.0**-46)
    return eps * float(torch.linalg.vector_norm(matrix, dtype=torch.float64))


def leading_subspaces(matrix: Tensor, rank: int) -> Subspaces:
    """Find the leading left and right singular subspaces, in float64 whatever the input dtype.

    The rank is clipped to the numerical rank (`rank_tolerance`): beyond it singular vectors are arbitrary, and
    arbitrary directions would reach rows and columns that the fine-tune never touched.

    Args:
        matrix: (m, n), float32 or float64, finite.
        rank: dimension asked for, >= 0.

    Raises:
        ShapeError: not a matrix.
        ConvergenceError: the decomposition failed.
    """
    if matrix.ndim != 2:
        raise ShapeError(f"leading_subspaces: expected a matrix, got shape {tuple(matrix.shape)}")
    exact = matrix.double()
    norm = float(torch.linalg.vector_norm(exact))
    if norm == 0.0 or rank == 0:
        m, n = matrix.shape
        return Subspaces(exact.new_zeros(m, 0), exact.new_zeros(0, 0), exact.new_zeros(0, n), float(norm == 0.0), 0.0)
    U, s, Vh = svd(exact)
    k = min(rank, int((s > rank_tolerance(matrix)).sum()))
    U, s, Vh = U[:, :k], s[:k], Vh[:k]
    residual = float(torch.linalg.vector_norm(exact @ Vh.mT - U * s)) / norm
    energy = min(1.0, float(s.square().sum()) / norm**2)
    return Subspaces(U, torch.diag(s), Vh, energy, residual)
