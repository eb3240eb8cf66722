"""Eigenvalues of a symmetric tridiagonal matrix, and the eigenvectors of its largest ones, by divide and conquer.

``T = [T_1, 0; 0, T_2] + rho w w^T``, where w is zero but for two neighbouring elements. With
``T_i = Q_i D_i Q_i^T`` the problem is ``D + rho z z^T``, whose eigenvalues are the roots of the secular equation
(Cuppen, Numerische Mathematik 36, 1981; Gu and Eisenstat, SIAM J. Matrix Anal. Appl. 16, 1995). The last product, of
the Q_i and its eigenvectors, is half of the work, and takes the wanted columns alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import backends
from .decompositions import eigh

# Up to this size LAPACK solves the dense matrix.
LEAF = 100
# Directions without a part in the secular equation are left out of the products if there are so many.
FEW = 0.9


class Solved(NamedTuple):
    """Eigenvalues (n,), rising, and eigenvectors (n, n)."""

    values: Tensor
    vectors: Tensor


class Whole:
    """The eigenvalues and eigenvectors of a small tridiagonal matrix; see `Halves`."""

    def __init__(self, diagonal: Tensor, beside: Tensor) -> None:
        self.values, self._vectors = eigh(diagonal.diag() + beside.diag(1))  # of which the upper half is read

    def vectors(self, count: int) -> Tensor:
        """Return the eigenvectors (n, count) of the largest eigenvalues, those of larger ones last."""
        return self._vectors[:, len(self.values) - count :].contiguous()


class Halves:
    """The eigenvalues of a tridiagonal matrix, of which the halves are solved.

    Attributes:
        values: (n,) float64, rising.
    """

    def __init__(self, diagonal: Tensor, beside: Tensor) -> None:
        """Solve both halves and the secular equation.

        Args:
            diagonal: (n,) float64 on the CPU, n > 1.
            beside: (n - 1,)
        """
        n, half = len(diagonal), len(diagonal) // 2
        link = float(beside[half - 1])
        own = diagonal.clone()
        own[half - 1 : half + 1] -= abs(link)
        self._halves = solved(own[:half], beside[: half - 1]), solved(own[half:], beside[half:])
        first, second = self._halves
        weights = torch.cat([first.vectors[-1], second.vectors[0] * (1.0 if link >= 0 else -1.0)]).div_(2**0.5)
        values = torch.cat([first.values, second.values])
        rho = 2 * abs(link)
        self._native, self._threads = backends.native("cpu"), torch.get_num_threads()
        whole = diagonal.new_empty(4, n, dtype=torch.int64)
        self._turns, counts = diagonal.new_empty(n, 2), whole.new_empty(2)
        kept, dropped, pairs = whole[0], whole[1], whole[2:].view(n, 2)
        tolerance = 8 * 2.0**-53 * max(float(values.abs().amax()), rho)
        self._native.deflate(
            values.data_ptr(), weights.data_ptr(), n, rho, tolerance,
            tuple(x.data_ptr() for x in (kept, dropped, pairs, self._turns, counts)),
        )  # fmt: skip
        size, self._rotations = counts.tolist()
        self._kept, self._dropped, self._pairs = kept[:size], dropped[: n - size], pairs
        self._poles, own_weights = values[self._kept], weights[self._kept]
        self._origins, self._offsets = whole.new_empty(size), diagonal.new_empty(size)
        self._adjusted = diagonal.new_empty(size)
        if size:
            self._native.secular_roots(
                self._poles.data_ptr(), own_weights.data_ptr(), size, rho, self._roots(), self._threads
            )
        everything = torch.cat([self._poles[self._origins] + self._offsets, values[self._dropped]])
        self.values, self._order = everything.sort(stable=True)

    def _roots(self) -> tuple[int, int, int]:
        return self._origins.data_ptr(), self._offsets.data_ptr(), self._adjusted.data_ptr()

    def vectors(self, count: int) -> Tensor:
        """Return the eigenvectors (n, count) of the largest eigenvalues, larger ones last; rows are contiguous."""
        n, size = len(self.values), len(self._kept)
        wanted = self._order[n - count :]
        rows = self.values.new_zeros(count, n)  # coefficients for the columns of Q_1 and Q_2
        of_roots = (wanted < size).nonzero()[:, 0]
        roots, others = wanted[of_roots], (wanted >= size).nonzero()[:, 0]
        if len(roots):
            self._native.secular_vectors(
                self._poles.data_ptr(), self._roots(), size,
                (roots.data_ptr(), of_roots.data_ptr(), len(roots), self._kept.data_ptr()),
                rows.data_ptr(), n, self._threads,
            )  # fmt: skip
        own = self._dropped[wanted[others] - size]
        rows[others, own] = 1
        turned = self._pairs[: self._rotations]
        if self._rotations:
            self._native.rotate_back(
                turned.data_ptr(), self._turns.data_ptr(), self._rotations, rows.data_ptr(), count, n, self._threads
            )
        used = torch.zeros(n, dtype=torch.bool, device=rows.device)
        for places in (self._kept, own, turned.flatten()):
            used[places] = True
        found, first = rows.new_empty(n, count), 0
        for half in self._halves:
            part = slice(first, first + len(half.values))
            _multiply(half.vectors, rows[:, part], used[part], found[part])
            first = part.stop
        return found


def tridiagonal(diagonal: Tensor, beside: Tensor) -> Halves | Whole:
    """Return the eigenvalues of a tridiagonal matrix, float64 on the CPU, from which its eigenvectors can be formed.

    Args:
        diagonal: (n,)
        beside: (n - 1,)

    Raises:
        ConvergenceError: LAPACK failed.
    """
    return (Whole if len(diagonal) <= LEAF else Halves)(diagonal, beside)


def solved(diagonal: Tensor, beside: Tensor) -> Solved:
    """Return all eigenvalues and eigenvectors: see `tridiagonal`."""
    found = tridiagonal(diagonal, beside)
    return Solved(found.values, found.vectors(len(diagonal)))


def _multiply(vectors: Tensor, rows: Tensor, used: Tensor, out: Tensor) -> None:
    """Write ``vectors @ rows^T``, where columns of `rows` that are not used are zero."""
    columns = used.nonzero()[:, 0]
    if len(columns) < FEW * len(used):
        vectors, rows = vectors[:, columns], rows[:, columns]
    torch.mm(vectors, rows.mT, out=out)
