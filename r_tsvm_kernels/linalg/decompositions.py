"""LAPACK and cuSOLVER decompositions that raise our own exceptions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import ConvergenceError, NonFiniteError, RtsvmError

# Below this norm, squares that count may vanish; above its inverse they overflow.
SQUARES_ARE_LOST = 2.0**-400

_LinAlgError = torch.linalg.LinAlgError  # type: ignore[attr-defined]


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return U (m, k), s (k,) falling and Vh (k, n) of the thin SVD, with k = min(m, n).

    Raises:
        NonFiniteError: the matrix holds NaN or infinity.
        ConvergenceError: the SVD failed.
    """
    try:
        U, s, Vh = torch.linalg.svd(matrix, full_matrices=False)
    except _LinAlgError as error:
        raise _failed(matrix, "SVD", error) from error
    return U, s, Vh


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues (n,), rising, and eigenvectors (n, n) of a symmetric matrix.

    Raises:
        NonFiniteError: the matrix holds NaN or infinity.
        ConvergenceError: the decomposition failed.
    """
    try:
        # LAPACK reduces the upper half up to a tenth faster than the lower one.
        values, vectors = torch.linalg.eigh(matrix, UPLO="U")
    except _LinAlgError as error:
        raise _failed(matrix, "eigenvalue decomposition", error) from error
    return values, vectors


def frobenius_norm(matrix: Tensor) -> float:
    """Return the Frobenius norm in float64, without overflow or underflow of the squares."""
    norm = float(torch.linalg.vector_norm(matrix, dtype=torch.float64))
    if SQUARES_ARE_LOST < norm < 1 / SQUARES_ARE_LOST:
        return norm
    scaled, power = near_one(matrix)
    return math.ldexp(1.0, power - 24) * float(torch.linalg.vector_norm(scaled)) * 2.0**24


def largest_magnitude(matrix: Tensor) -> float:
    """Return the largest magnitude of an element, NaN if one is NaN and 0 if there is none.

    On a CPU, the maximum norm of PyTorch takes ten times as long.
    """
    if not matrix.numel():
        return 0.0
    least, most = torch.stack(matrix.aminmax()).tolist()  # waits for a GPU once
    return math.nan if math.isnan(least) else float(max(-least, most))


def near_one(matrix: Tensor) -> tuple[Tensor, int]:
    """Divide a matrix by a power of two, so that magnitudes are at most 1; return it, float64, and the exponent."""
    largest = largest_magnitude(matrix)
    power = max(math.frexp(largest)[1], -1000) if math.isfinite(largest) else 0
    return matrix.double() * 2.0**-power, power


def _failed(matrix: Tensor, what: str, error: Exception) -> RtsvmError:
    if not bool(torch.isfinite(matrix).all()):
        return NonFiniteError(f"a {tuple(matrix.shape)} matrix holds NaN or infinity: it has no {what}")
    return ConvergenceError(f"the {what} of a {tuple(matrix.shape)} matrix did not converge: {error}")
