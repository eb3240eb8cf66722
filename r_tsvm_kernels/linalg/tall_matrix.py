"""Products with a tall matrix, by tiles of rows, in a chosen precision and scale."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..errors import NonFiniteError
from .decompositions import largest_magnitude
from .heap import keep_freed_memory
from .two_stage import every_eigenvector

# Bytes for copies of matrix rows and the products of them. A 128256 x 4096 embedding is processed in tiles of this
# size, beside a few square matrices of the short side.
WORKSPACE = 512 << 20


class TallMatrix:
    """A view of a matrix as tall (transposed if it is wide), scaled by a power of two; the scaled matrix is not stored.

    The largest magnitude is scaled into [1, 2), so that squares neither overflow nor vanish in float32.

    Attributes:
        matrix: the tall view (m, n), m >= n, in the caller's units.
        transposed: whether that is the transpose of the given matrix.
        scale: factor of its elements in every product.
        squared_norm: squared Frobenius norm in the scaled units.
        eigenvectors: what `decompose` keeps.
    """

    def __init__(
        self, matrix: Tensor, transposed: bool | None = None, workspace: int = WORKSPACE, siblings: int = 0
    ) -> None:
        """View `matrix` as tall.

        Args:
            matrix: any matrix.
            transposed: overrides the choice of the view.
            workspace: bytes for copies of its rows.
            siblings: number of matrices of this shape that a merge reads again and again. If float64 copies of all of
                them take at most a quarter of the workspace, `forget` keeps them.

        Raises:
            NonFiniteError: it holds NaN or infinity.
        """
        keep_freed_memory()
        m, n = matrix.shape
        self.transposed = m < n if transposed is None else transposed
        self.matrix = matrix.mT if self.transposed else matrix
        self.workspace = workspace
        largest = largest_magnitude(matrix)
        if not math.isfinite(largest):
            raise NonFiniteError(f"a {tuple(matrix.shape)} matrix holds NaN or infinity: it has no singular values")
        self.scale = 2.0 ** min(1020, 1 - math.frexp(largest)[1]) if largest else 1.0
        self._wide: Tensor | None = None
        self.eigenvectors: tuple[Tensor, Tensor] | None = None
        self._keeps = 0 < siblings * 8 * matrix.numel() <= workspace // 4
        self.squared_norm = sum(float(torch.linalg.vector_norm(tile)) ** 2 for _, tile in self.tiles(torch.float64))

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of the tall view."""
        return self.matrix.shape[0], self.matrix.shape[1]

    def ranges(self) -> list[slice]:
        """Return the row ranges of the tiles: a tile and its products take half of the workspace."""
        m, n = self.shape
        height = max(256, self.workspace // (4 * 8 * max(n, 1)))
        return [slice(first, min(m, first + height)) for first in range(0, m, height)]

    def tile(self, rows: slice, dtype: torch.dtype) -> Tensor:
        """Return some rows, scaled, in `dtype`. A float64 tile of all rows is kept until `forget` drops it."""
        if dtype == torch.float64 and self._wide is not None:
            return self._wide
        tile = self.matrix[rows]
        # Scale before narrowing and after widening, so that nothing overflows or vanishes needlessly.
        widened = tile.dtype != dtype == torch.float64
        scaled = tile.to(dtype).mul_(self.scale) if widened else (tile * self.scale).to(dtype)
        if dtype == torch.float64 and len(tile) == len(self.matrix):
            self._wide = scaled
        return scaled

    def forget(self) -> None:
        """Drop the copy that `tile` keeps, unless those of all siblings are small."""
        if not self._keeps:
            self._wide = None

    def tiles(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Yield the row ranges and their rows, one tile at a time."""
        for rows in self.ranges():
            yield rows, self.tile(rows, dtype)

    def gram(self, dtype: torch.dtype) -> Tensor:
        """Return ``D^T D`` (n, n), accumulated over the tiles in `dtype`."""
        n = self.shape[1]
        total = self.matrix.new_empty(n, n, dtype=dtype)
        for rows, tile in self.tiles(dtype):
            add_gram(total, tile, fresh=rows.start == 0)
        return total

    def decompose(self) -> None:
        """Keep all eigenvalues of ``D^T D``, rising, and its eigenvectors, float64, for whoever needs them next.

        Raises:
            ConvergenceError: the decomposition failed.
        """
        self.eigenvectors = every_eigenvector(self.gram(torch.float64))

    def gram_times(self, V: Tensor) -> Tensor:
        """Return ``D^T (D V)`` (n, k) in the dtype of V, for few columns k of at most unit length."""
        total = torch.zeros_like(V)
        if self.matrix.dtype == V.dtype and abs(math.log2(self.scale)) < 60:
            for rows in self.ranges():  # scaled afterwards: a scaled copy would take longer than the products
                tile = self.matrix[rows]
                total += tile.mT @ ((tile @ V) * self.scale)
            return total.mul_(self.scale)
        for _, tile in self.tiles(V.dtype):
            total += tile.mT @ (tile @ V)
        return total

    def normal_times(self, V: Tensor) -> Tensor:
        """Return ``D^T (D V)`` (n, k) in float64."""
        total = V.new_zeros(V.shape[1], V.shape[0])  # transposed: products with a thin matrix from the left are slower
        for _, tile in self.tiles(torch.float64):
            total.addmm_((tile @ V).mT, tile)
        return total.mT

    def image_gram(self, V: Tensor) -> Tensor:
        """Return ``(D V)^T (D V)`` (k, k) in float64."""
        total = V.new_zeros(V.shape[1], V.shape[1])
        for _, tile in self.tiles(torch.float64):
            image = tile @ V
            total.addmm_(image.mT, image)
        return total

    def triangular_factor(self, V: Tensor | None = None) -> Tensor:
        """Return R of ``D = Q R``, or of ``D V``, in float64; Q is not formed."""
        n = self.shape[1] if V is None else V.shape[1]
        R = self.matrix.new_zeros(0, n, dtype=torch.float64)
        for _, tile in self.tiles(torch.float64):
            R = torch.linalg.qr(torch.cat([R, tile if V is None else tile @ V]), mode="r").R
        return R


def add_gram(total: Tensor, X: Tensor, *, fresh: bool = False) -> None:
    """Add ``X^T X`` to a symmetric `total`, by blocks of columns; those above the diagonal are mirrored.

    Args:
        total: (n, n)
        X: (m, n)
        fresh: whether to overwrite what `total` holds.
    """
    n = X.shape[1]
    # Up to a third slower where widths are no multiples of 64.
    width = 128 if n <= 512 else max(192, n // 8 // 64 * 64)
    for first in range(0, n, width):
        own, rest = slice(first, first + width), slice(first, n)
        total[rest, own].addmm_(X[:, rest].mT, X[:, own], beta=0 if fresh else 1)
    for first in range(width, n, width):
        before, own = slice(0, first), slice(first, first + width)
        total[before, own] = total[own, before].mT
