"""The leading eigenvectors of a dense symmetric matrix in two stages, on a CPU.

LAPACK's `eigh` reduces the matrix to tridiagonal form by products with vectors, which is half of its time, and finds
all eigenvectors. Here the matrix is reduced to a band of 64 diagonals by products of matrices, and the band to
tridiagonal form by chasing bulges (Bischof, Lang and Sun, ACM TOMS 26, 2000):

    A = Q_1 B Q_1^T,   B = Q_2 T Q_2^T,   T = U diag(values) U^T

Then only the wanted columns of U are computed, and turned back by Q_2 and Q_1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..errors import NonFiniteError
from .decompositions import eigh, largest_magnitude
from .divide_and_conquer import tridiagonal

# r_tsvm::kBand, kColumn, kSweeps and kSlot.
BAND, COLUMN, SWEEPS, SLOT = 64, 144, 32, 72
# The matrix is updated by block columns, from the block on the diagonal on: of a quarter of it, at least so wide.
WIDTH = 256


class Panel(NamedTuple):
    """The block reflector ``I - U V^T`` of the last m rows; both (m, 64)."""

    V: Tensor
    U: Tensor


# A matrix whose largest magnitude is farther from 1 is scaled: squares must neither overflow nor vanish.
FAR = 2.0**64

# The highest level of x86-64 (1, 3 or 4) that may be used. Tests lower it.
LEVEL = 4
# From this size on the leading third of the eigenvectors is found sooner than all of them by LAPACK: with one thread,
# and with several, of which LAPACK makes better use.
LARGE, LARGE_FOR_THREADS = 512, 1024
# The same for all of them.
LARGE_FOR_ALL = 1536


def two_stage_runs(device: torch.device) -> bool:
    """Whether `leading_eigenvectors` can run."""
    return (
        device.type == "cpu"
        and backends.state("cpu") == backends.READY
        and hasattr(backends.native("cpu"), "panel_reflectors")  # an older build lacks it
    )


def two_stage_pays(n: int, device: torch.device) -> bool:
    """Whether `leading_eigenvectors` can and should run on a matrix (n, n)."""
    return two_stage_runs(device) and n >= (LARGE if torch.get_num_threads() == 1 else LARGE_FOR_THREADS)


def every_eigenvector(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues (n,), rising, and eigenvectors (n, n) of a symmetric matrix, by the faster way.

    Raises:
        NonFiniteError, ConvergenceError: as `eigh`.
    """
    if len(matrix) >= LARGE_FOR_ALL and matrix.dtype == torch.float64 and two_stage_pays(len(matrix), matrix.device):
        return leading_eigenvectors(matrix.clone(memory_format=torch.contiguous_format), len)
    return eigh(matrix)


def leading_eigenvectors(matrix: Tensor, count: Callable[[Tensor], int]) -> tuple[Tensor, Tensor]:
    """Return all eigenvalues (n,), rising, and the eigenvectors (n, k) of the k largest, those of larger ones last.

    Args:
        matrix: (n, n) float64 on the CPU, symmetric, rows contiguous. It is overwritten.
        count: maps the eigenvalues, rising, to k.

    Raises:
        NonFiniteError: the matrix holds NaN or infinity.
        ConvergenceError: LAPACK failed on a small part.
    """
    reduced = Reduced(matrix)
    return reduced.values, reduced.vectors(count(reduced.values))


class Reduced:
    """A symmetric matrix (n, n) in tridiagonal form, and what turns the eigenvectors of that into its own.

    Attributes:
        values: (n,) eigenvalues, rising.
    """

    def __init__(self, matrix: Tensor) -> None:
        """Reduce a matrix: see `leading_eigenvectors`."""
        n = len(matrix)
        largest = largest_magnitude(matrix)
        if not math.isfinite(largest):
            raise NonFiniteError(f"a {n}x{n} matrix holds NaN or infinity: it has no eigenvalue decomposition")
        if largest == 0 or n < 2:
            self.values, self._halves = matrix.diagonal().clone(), None
            return
        scale = 1.0
        if not 1 / FAR <= largest <= FAR:
            scale = 2.0 ** -math.frexp(largest)[1]
            matrix.mul_(scale)
        self._panels = _to_band(matrix)
        band = _lower_band(matrix)
        self._chased = _chase(band, n)
        self._halves = tridiagonal(band[:n, 0].clone(), band[: n - 1, 1].clone())
        self.values = self._halves.values / scale

    def vectors(self, count: int, before: int = 0) -> Tensor:
        """Return eigenvectors (n, count - before): those of the largest eigenvalues but for the `before` largest ones.

        Those of larger eigenvalues come last.
        """
        n = len(self.values)
        if self._halves is None:
            return torch.eye(n, dtype=self.values.dtype, device=self.values.device)[:, n - count : n - before]
        vectors = self._halves.vectors(count)[:, : count - before].contiguous()
        _turn_by_chasing(vectors, *self._chased)
        for index, panel in reversed(list(enumerate(self._panels))):
            rows = vectors[(index + 1) * BAND :]
            rows.addmm_(panel.U, panel.V.mT @ rows, alpha=-1)
        # Where elements are equal, as in a matrix of ones, their rounding errors have one sign and add up in the norm.
        return vectors.div_(torch.linalg.vector_norm(vectors, dim=0))


def _to_band(A: Tensor) -> list[Panel]:
    """Reduce A to 64 diagonals below the main one; the lower half of A is read and overwritten."""
    n, panels = len(A), list[Panel]()
    for first in range(0, n - BAND - 1, BAND):
        below = first + BAND
        panel = _panel(A[below:, first:below])  # nothing reads the zeros below R
        _reflect(A, below, panel)
        panels.append(panel)
    return panels


def _panel(columns: Tensor) -> Panel:
    """Return the reflectors of a QR decomposition; R takes the place of the first rows."""
    m = len(columns)
    # Columns are contiguous, for products with thin matrices, and an odd number of cache lines apart: otherwise some
    # would share a few places in a cache.
    height = 8 * (-(-m // 8) | 1)
    V, U = columns.new_empty(2, BAND, height)
    backends.native("cpu").panel_reflectors(
        columns.data_ptr(), m, columns.stride(0), V.data_ptr(), U.data_ptr(), height, LEVEL
    )
    return Panel(V.mT[:m], U.mT[:m])


def _reflect(A: Tensor, first: int, panel: Panel) -> None:
    """Apply a panel's reflectors to both sides of the last rows and columns of A, in the lower half."""
    (V, U), n, width = panel, len(A), max(WIDTH, len(A) // 4)
    blocks = [slice(max(start, first), min(start + width, n)) for start in range(first - first % width, n, width)]
    W = torch.zeros_like(U)
    for own in blocks:
        here, rest = slice(own.start - first, own.stop - first), slice(own.stop - first, None)
        W[here].addmm_(A[own, own], U[here])
        if own.stop < n:
            below = A[own.stop :, own]
            W[here].addmm_(below.mT, U[rest])
            W[rest].addmm_(below, U[here])
    W.addmm_(V, U.mT @ W, alpha=-0.5)
    left, right = torch.cat([V, W], dim=1), torch.cat([W.mT, V.mT])
    for own in blocks:
        here = slice(own.start - first, own.stop - first)
        A[own.start :, own].addmm_(left[own.start - first :], right[:, here], alpha=-1)


def _lower_band(A: Tensor) -> Tensor:
    """Return the columns of the band as `chase_bulges` reads them."""
    n = len(A)
    band = A.new_zeros(n + 2 * BAND, COLUMN)
    for below in range(min(BAND + 1, n)):
        band[: n - below, below] = A.diagonal(-below)
    return band


def _chase(band: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Reduce the band to tridiagonal form; return the reflectors (slots, 72) and their factors (slots,)."""
    slots = SWEEPS * sum(-(-(n - 1 - sweep) // BAND) for sweep in range(0, n - 1, SWEEPS))
    reflectors, factors = band.new_zeros(slots, SLOT), band.new_zeros(slots)
    backends.native("cpu").chase_bulges(band.data_ptr(), n, reflectors.data_ptr(), factors.data_ptr(), LEVEL)
    return reflectors, factors


def _turn_by_chasing(vectors: Tensor, reflectors: Tensor, factors: Tensor) -> None:
    """Multiply by Q_2 from the left."""
    backends.native("cpu").turn_by_chasing(
        reflectors.data_ptr(), factors.data_ptr(), vectors.data_ptr(), *vectors.shape, vectors.stride(0),
        torch.get_num_threads(), LEVEL,
    )  # fmt: skip
