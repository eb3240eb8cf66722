"""A few leading singular triplets above a gap, by block iteration, without decompositions of square matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from .arguments import given_matrices
from .decompositions import svd

OVERSAMPLING = 8
# Steps of iteration before each measurement of the error. A step is two thin products.
_STEPS = (6, 6, 12)
# Largest estimated error; that of a truncated SVD in fast mode.
_TOLERANCE = 1e-5
# For a larger share of the singular values `truncated_svd` is as cheap.
_LARGEST_SHARE = 8
_TILE_BYTES = 64 << 20


def subspace_iteration(matrix: Tensor, rank: int, dominant: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """Compute the leading singular triplets, or return None if the iteration does not find them.

    Orthogonal iteration from a fixed random start (Halko, Martinsson and Tropp, SIAM Review 53(2), 2011, algorithm 4.4)
    on a block of `dominant` directions and 8 more, in the matrix's dtype, then Rayleigh-Ritz in float64. To first
    order ``norm(D^T U - V S) / (S[k-1] - sigma)`` is the sine of the angle to the exact subspaces, with sigma an
    estimate of the singular values outside the block; it must be at most 1e-5.

    Args:
        matrix: (m, n), float32 or float64, finite.
        rank: k >= 1.
        dominant: number of singular values above the gap, >= `rank`.

    Returns:
        U (m, k), S (k,) and Vh (k, n), float64. None if there is no such gap, or if the block is so large that
        `truncated_svd` is as cheap.

    Raises:
        ShapeError: the argument is not a matrix.
        DTypeError: it is not a dense tensor of float32 or float64.
        ConvergenceError: the SVD of the small core failed.

    Examples:
        >>> U, S, Vh = subspace_iteration(torch.diag(torch.tensor([5.0, 3.0] + [1e-6] * 98)), 2, 2)
        >>> S.round(decimals=4)
        tensor([5., 3.], dtype=torch.float64)
    """
    (matrix,) = given_matrices([matrix], "subspace_iteration")
    block = dominant + OVERSAMPLING
    if block * _LARGEST_SHARE > min(matrix.shape) or rank > dominant:
        return None
    generator = torch.Generator().manual_seed(0)
    shape = (matrix.shape[1], block)  # drawn on the CPU: the same on every device
    V = torch.randn(shape, generator=generator, dtype=matrix.dtype, device="cpu").to(matrix.device)
    for steps in _STEPS:
        for _ in range(steps):
            V = torch.linalg.qr(matrix.mT @ torch.linalg.qr(matrix @ V).Q).Q
        right = torch.linalg.qr(V.double()).Q
        U, core = torch.linalg.qr(_product(matrix, right))
        P, values, Qh = svd(core)
        U, Vh = U @ P[:, :rank], Qh[:rank] @ right.mT
        residual = torch.linalg.vector_norm(_product_left(matrix, U) - Vh.mT * values[:rank])
        gap = values[rank - 1] - values[dominant]
        if gap > 0 and residual <= _TOLERANCE * gap:
            return U, values[:rank], Vh
    return None


def _product(matrix: Tensor, thin: Tensor) -> Tensor:
    """Return ``matrix @ thin`` in float64."""
    return torch.cat([rows.double() @ thin for rows in _tiles(matrix)])


def _product_left(matrix: Tensor, thin: Tensor) -> Tensor:
    """Return ``matrix^T @ thin`` in float64."""
    result = thin.new_zeros(matrix.shape[1], thin.shape[1])
    first = 0
    for rows in _tiles(matrix):
        result.addmm_(rows.double().mT, thin[first : first + len(rows)])
        first += len(rows)
    return result


def _tiles(matrix: Tensor) -> list[Tensor]:
    rows = max(1, _TILE_BYTES // (8 * matrix.shape[1]))
    return [matrix[first : first + rows] for first in range(0, len(matrix), rows)]
