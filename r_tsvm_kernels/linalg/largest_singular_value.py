"""The largest singular value of a matrix, by block Lanczos iteration."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import DTypeError, ShapeError
from ..foreign_devices import on_own_device
from ..ops._checks import FLOAT_DTYPES
from .arguments import dense
from .decompositions import eigh
from .factored import Factored, leading_triplets
from .on_device import gaussian
from .tall_matrix import WORKSPACE, TallMatrix

# Columns of a block, and the most blocks. Up to SMALL columns of the matrix, its Gram matrix is decomposed.
BLOCK, BLOCKS, SMALL = 8, 16, 256


@on_own_device
def spectral_norm(matrix: Tensor | Factored, *, rtol: float = 1e-3, workspace: int = WORKSPACE) -> float:
    """Estimate the largest singular value from below, up to rounding.

    The largest eigenvalue of ``D^T D`` in a Krylov space of random vectors grows. The search ends when its residual is
    below `rtol`: an exact singular value is then this close. That it is not the largest is possible, but very unlikely
    for vectors drawn at random (Musco and Musco, "Randomized Block Krylov Methods", 2015, theorem 1). If the residual
    is larger in 128 dimensions still, the value found there is returned. Takes a few products of the matrix with 8
    vectors, in float32 (float64 for float64).

    Args:
        matrix: (m, n), float64, float32, float16 or bfloat16, finite; or a `Factored` matrix, whose value is exact.
        rtol: relative residual of the eigenvalue; a singular value is within half of it.
        workspace: bytes for copies of matrix rows.

    Returns:
        The norm in the units of the matrix; 0.0 for a matrix of zeros.

    Raises:
        ShapeError: the argument is not a matrix.
        DTypeError: it is not a dense tensor of one of these dtypes.
        NonFiniteError: it holds NaN or infinity.
        ConvergenceError: a decomposition failed.

    Examples:
        >>> spectral_norm(torch.tensor([[3.0, 0.0], [0.0, -4.0]]))
        4.0
    """
    if isinstance(matrix, Factored):
        values = leading_triplets(matrix, 1).S
        return float(values[0]) if len(values) else 0.0
    given = dense(matrix, "spectral_norm")
    if given.ndim != 2:
        raise ShapeError(f"spectral_norm: expected a matrix (m, n), got shape {tuple(given.shape)}")
    if given.dtype not in FLOAT_DTYPES:
        raise DTypeError(f"spectral_norm: expected a float dtype, got {given.dtype}; convert it with .float()")
    tall = TallMatrix(given, workspace=workspace)
    if not tall.squared_norm:
        return 0.0
    n = tall.shape[1]
    if n <= SMALL:
        largest = float(eigh(tall.gram(torch.float64))[0][-1])
    else:
        largest = _largest_eigenvalue(tall, rtol)
    tall.forget()
    return math.sqrt(max(largest, 0.0)) / tall.scale


def _largest_eigenvalue(matrix: TallMatrix, rtol: float) -> float:
    """Return the largest eigenvalue of ``D^T D`` in the scaled units."""
    dtype = torch.float64 if matrix.matrix.dtype == torch.float64 else torch.float32
    n, device = matrix.shape[1], matrix.matrix.device
    block = torch.linalg.qr(gaussian(n, BLOCK, device).to(dtype)).Q
    # Rows are the vectors: products of them with thin matrices read memory in order.
    basis, images = (torch.zeros(BLOCK * BLOCKS, n, dtype=dtype, device=device) for _ in range(2))
    inner, value = torch.zeros(BLOCK * BLOCKS, BLOCK * BLOCKS, dtype=dtype, device=device), 0.0
    for size in range(BLOCK, BLOCK * BLOCKS + 1, BLOCK):
        own, known = slice(size - BLOCK, size), basis[:size]
        image = matrix.gram_times(block)
        basis[own], images[own] = block.mT, image.mT
        products = known @ image
        inner[:size, own], inner[own, :size] = products, products.mT
        values, vectors = eigh((inner[:size, :size] + inner[:size, :size].mT) / 2)
        value, y = float(values[-1]), vectors[:, -1]
        if float(torch.linalg.vector_norm(y @ images[:size] - value * (y @ known))) <= rtol * value:
            break
        # Twice: of a matrix of low rank, nothing but rounding is left of the image beside the basis.
        block = image
        for _ in range(2):
            block = torch.linalg.qr(block - known.mT @ (known @ block)).Q
    return value
