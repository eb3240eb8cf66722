"""LAPACK and cuSOLVER decompositions whose failures are our own exceptions."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ConvergenceError

_LinAlgError = torch.linalg.LinAlgError  # type: ignore[attr-defined]


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the thin SVD.

    Raises:
        ConvergenceError: it failed.
    """
    try:
        U, s, Vh = torch.linalg.svd(matrix, full_matrices=False)
    except _LinAlgError as error:
        raise ConvergenceError(f"the SVD of a {tuple(matrix.shape)} matrix did not converge: {error}") from error
    return U, s, Vh


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues, ascending, and eigenvectors of a symmetric matrix.

    Raises:
        ConvergenceError: it failed.
    """
    try:
        values, vectors = torch.linalg.eigh(matrix)
    except _LinAlgError as error:
        raise ConvergenceError(
            f"the eigenvalues of a {tuple(matrix.shape)} matrix did not converge: {error}"
        ) from error
    return values, vectors
