"""The leading right singular vectors of one tall matrix, from its Gram matrix.

Two routes. ``gram-float64``: Gram matrix and eigenvectors in float64. ``gram-float32``: both in float32, which is
twice as fast, then corrected in float64. Only the mixing between leading and other eigenvectors matters, and its
first-order correction costs a few thin products:

    X[i, j] = (V_other^T R)[i, j] / (lambda_j - lambda_i),   R = D^T D V - V (V^T D^T D V),   V <- V + V_other X

Where the eigenvalues are too close for it, within a window around the cut, the small problem is solved in float64.
What is left is measured on random vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConvergenceError
from .decompositions import eigh
from .orthonormal import cholesky_whitened
from .tall_matrix import TallMatrix
from .transfer import gaussian

# Below this share of the largest eigenvalue the eigenvectors of a float32 Gram matrix are too wrong for corrections to
# be worth while; those of a float64 Gram matrix are noise.
FLOAT32_FLOOR, FLOAT64_FLOOR = 1e-3, 1e-13
# A correction squares the error, or at least shrinks it as much as the one before: starting from more than this, two
# would not do, and float64 from the start is cheaper than three.
CORRECTABLE, CORRECTIONS = 3e-3, 2
PROBES = 8
WINDOW = 32


@dataclass(frozen=True)
class Eigenspace:
    """Leading eigenvectors of ``D^T D``.

    Attributes:
        V: (n, k) float64, orthonormal to rounding, ordered by falling eigenvalue.
        values: (n,) all eigenvalues of ``D^T D`` in the scaled units of the matrix, falling.
        error: estimated sine of the angle to the exact subspace (Frobenius norm over all directions).
    """

    V: Tensor
    values: Tensor
    error: float


def gram_float64(matrix: TallMatrix, choose: Callable[[Tensor], int]) -> Eigenspace:
    """Return the leading eigenspace by float64 Gram matrix and eigenvectors.

    Args:
        matrix: D.
        choose: maps the eigenvalues, falling, to the dimension wanted.

    Raises:
        ConvergenceError: eigenvalues of that size drown in rounding, or the decomposition failed.
    """
    values, Q = eigh(matrix.gram(torch.float64))
    rank = choose(values.clamp(min=0).flip(0))
    cut = len(values) - rank
    if rank and values[cut] <= FLOAT64_FLOOR * values[-1]:
        raise ConvergenceError("gram-float64: the smallest wanted singular value is lost in rounding")
    V = Q[:, cut:]
    window = _window(len(values), rank)
    error = _mixing(matrix, V, values[cut], Q[:, : cut - window], values[: cut - window])
    return Eigenspace(V.flip(1), values.clamp(min=0).flip(0), error)


def gram_float32(matrix: TallMatrix, rank: int, tolerance: float) -> Eigenspace:
    """Return the leading eigenspace by float32 eigenvectors, corrected until the estimated error is below `tolerance`.

    Raises:
        ConvergenceError: the spectrum falls too far for float32, the corrections do not get there, or the
            decomposition failed.
    """
    approximate, Q = eigh(matrix.gram(torch.float32))
    n = len(approximate)
    cut = n - rank
    if approximate[cut] <= FLOAT32_FLOOR * approximate[-1]:
        raise ConvergenceError("gram-float32: the smallest wanted singular value is too small")
    values, V, others = approximate.double(), Q[:, cut:].double(), Q[:, :cut]
    window = _window(n, rank)
    far = cut - window
    for _ in range(CORRECTIONS):
        V, values[cut:] = _corrected(matrix, V, others, values, window)
        _solve_window(matrix, V, others, values, window)
        error = _mixing(matrix, V, values[cut], others[:, :far], values[:far])
        if error <= tolerance:
            break
    if not error <= tolerance:
        raise ConvergenceError(f"gram-float32: estimated error {error:.0e} of the subspace, allowed {tolerance:.0e}")
    return Eigenspace(V.flip(1), values.clamp(min=0).flip(0), error)


def _window(n: int, rank: int) -> int:
    return min(max(WINDOW, n // 32), rank, n - rank)


def _mixing(matrix: TallMatrix, V: Tensor, smallest: Tensor, others: Tensor, values: Tensor) -> float:
    """Estimate ``norm(X)`` (Frobenius) to first order, from random vectors in the span of `V`.

    Too large rather than too small: the gap of every pair is taken to be that of the smallest wanted eigenvalue.
    Pairs inside the window are left out: there the float64 decomposition decides, as well as any could.
    """
    if others.shape[1] == 0 or V.shape[1] == 0:
        return 0.0
    z = gaussian(V.shape[1], PROBES, V.device)
    image = matrix.normal_times(V @ z)
    residual = image - V @ (V.mT @ image)
    # Its entries may be as small as the rounding of their own largest: float64 throughout, the block is thin.
    mixing = (others.double().mT @ residual) / (smallest - values)[:, None]
    return float(torch.linalg.vector_norm(mixing) / PROBES**0.5)


def _corrected(matrix: TallMatrix, V: Tensor, others: Tensor, values: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Return the basis after one first-order correction, and its Rayleigh quotients, rising.

    The columns need not be orthonormal beyond float32: that adds an error of second order.

    Raises:
        ConvergenceError: it is not a small correction.
    """
    cut = others.shape[1]
    image = matrix.normal_times(V)
    diagonal = (V * image).sum(0) / V.square().sum(0)
    residual = (image - V * diagonal).to(others.dtype)  # small: float32 holds it well enough
    gaps = (diagonal[None, :] - values[:cut, None]).to(others.dtype)
    X = (others.mT @ residual) / gaps
    X[cut - window :, :window] = 0  # these pairs are solved exactly afterwards
    moved = float(torch.linalg.vector_norm(X))
    if not moved <= CORRECTABLE:
        raise ConvergenceError(f"gram-float32: off by {moved:.0e}, too much for a first-order correction")
    return cholesky_whitened(V + (others @ X).double()), diagonal


def _solve_window(matrix: TallMatrix, V: Tensor, others: Tensor, values: Tensor, window: int) -> None:
    """Solve the eigenproblem of the vectors next to the cut in float64; change basis, others and values in place."""
    if window == 0:
        return
    cut = others.shape[1]
    below = others[:, cut - window :].double()
    below = cholesky_whitened(below - V @ (V.mT @ below))
    near = torch.cat([below, V[:, :window]], dim=1)
    inner, rotation = eigh(matrix.image_gram(near))
    near = near @ rotation
    others[:, cut - window :] = near[:, :window].to(others.dtype)
    values[cut - window : cut + window] = inner
    V[:, :window] = near[:, window:]
