"""The inverse square root of a Gram matrix ``X^T X``: times X it is the canonical polar factor of X.

Three routes, from cheap to exact. ``gram-float32``: eigenvectors in float32, at half the cost; those of small
eigenvalues, which the inverse root amplifies, are corrected to first order in float64, a thin problem.
``gram-float64``: eigenvectors in float64. ``svd-float64``: the SVD of a triangular factor of X, if squaring would lose
a singular value. Two orthonormal bases side by side have a closed form, with eigenvectors of half the size in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import ConvergenceError
from .decompositions import eigh, svd
from .on_device import gaussian
from .orthonormal import cholesky_whitened
from .rounding import BACKWARD_ERROR
from .tall_matrix import add_gram
from .two_stage import every_eigenvector

# Relative to the largest singular value. Concatenated bases of real fine-tunes have condition numbers up to a few
# thousand; rounding errors of float64 are near 1e-15. No meaningful values were seen in between.
RANK_TOLERANCE = 1e-6

# Share of the largest eigenvalue of a Gram matrix from which on the relative error of an eigenvalue is below 1e-5.
RESOLVED = 1e-10

# Share of the largest eigenvalue below which eigenvectors are corrected in float64. A smaller one leaves larger errors.
SMALL_EIGENVALUE = 0.015
# Largest share of the eigenvectors for which the correction saves time; bases of trained task matrices have up to 0.4.
FEW = 0.6
# From this share of the largest eigenvalue on, the relative error of an eigenvalue is below 1e-5 if the problem among
# the small ones is computed from X, and the singular value is not near the tolerance of the rank.
RESOLVED_FROM_IMAGES = 4 * RANK_TOLERANCE**2

PROBES = 8

# Rows of a float32 matrix that are multiplied in float64 at once.
ROWS = 64


@dataclass(frozen=True)
class SplitMatrix:
    """A matrix ``bulk + left @ right``, whose few large singular values are in the float64 part.

    Attributes:
        bulk: (k, n) float64, or float32 if the rest of the matrix is small enough for it.
        left: (k, j) float64.
        right: (j, n) float64, orthonormal rows, which the bulk maps to zero up to its rounding.
    """

    bulk: Tensor
    left: Tensor
    right: Tensor

    def row_norms(self) -> Tensor:
        """Return the norms of the rows (k,), float64."""
        norms: Tensor = torch.linalg.vector_norm(self.bulk, dim=1).double()
        return torch.hypot(norms, torch.linalg.vector_norm(self.left, dim=1))

    @classmethod
    def whole(cls, matrix: Tensor) -> SplitMatrix:
        """Wrap a float64 matrix."""
        return cls(matrix, matrix[:, :0], matrix[:0])

    def after(self, x: Tensor) -> Tensor:
        """Return ``x @ self`` (m, n) in the dtype of the bulk, for float64 x (m, k)."""
        dtype = self.bulk.dtype
        product = x.to(dtype) @ self.bulk
        return product.addmm_((x @ self.left).to(dtype), self.right.to(dtype)) if self.left.shape[1] else product

    def times(self, z: Tensor) -> Tensor:
        """Return ``self @ z`` (k, j), float64, for few columns z (n, j)."""
        # By blocks of rows: a wider copy of all of them would take longer than the product.
        blocks = [rows.double() @ z for rows in torch.split(self.bulk, ROWS)]
        return torch.cat(blocks).addmm_(self.left, self.right @ z) if blocks else z.new_zeros(0, z.shape[1])

    def map_rows(self, function: Callable[[Tensor], Tensor]) -> SplitMatrix:
        """Apply a linear function of the columns, such as a product from the left."""
        return SplitMatrix(function(self.bulk), function(self.left), self.right)


@dataclass(frozen=True)
class InverseRoot:
    """``(X^T X)^(-1/2)`` on the range of ``X^T``, 0 on its complement.

    Attributes:
        matrix: (k, k), symmetric; ``matrix.after(X)`` is the canonical polar factor of X.
        rank: number of singular values of X above the tolerance.
        condition: largest over smallest of these, 1.0 for a zero matrix.
        largest: the largest one, 0.0 for a zero matrix.
        sensitivity: (k,) float64, largest factor by which an error of each column of X enters the polar factor: twice
            the norm of that row of `matrix`, and more where the rank is not full.
        margin: distance of the singular values from the tolerance, as a share of the largest: an error of X beyond it
            could change the rank.
        rounding: bound of the polar factor's error by rounding in float64.
        route: ``gram-float32``, ``gram-float64`` or ``svd-float64``.
    """

    matrix: SplitMatrix
    rank: int
    condition: float
    largest: float
    sensitivity: Tensor
    margin: float
    rounding: float
    route: str

    def defect(self, *factors: Tensor, probes: Tensor | None = None) -> float:
        """Estimate the relative error (Frobenius) of the polar factor P from random vectors.

        ``norm(P^T P y - y) / norm(y)`` for y in the range of ``P^T``: as `matrix` is symmetric, only the true root
        makes P an isometry.

        Args:
            factors: whose product from left to right is ``X^T X``: that matrix itself, or ``R^T, R``, which is exact
                where squaring loses a singular value.
            probes: (k, any number), float64, further vectors beside Gaussian ones. The larger of both errors counts.
        """
        if self.rank == 0:
            return 0.0
        size = self.matrix.bulk.shape[0]
        groups = [gaussian(size, PROBES, self.matrix.bulk.device), *([] if probes is None else [probes])]
        z = torch.cat(groups, dim=1)
        y = self._isometry(factors, z)
        if self.rank == size:  # full rank: P^T P must be the identity
            again, y = y, z
        else:
            again = self._isometry(factors, y)
        widths = [group.shape[1] for group in groups]
        errors, norms = (
            [float(torch.linalg.vector_norm(part)) for part in torch.split(x, widths, dim=1)] for x in (again - y, y)
        )
        return max(error / norm if norm > 0 else 0.0 for error, norm in zip(errors, norms, strict=True))

    def projected(self, *factors: Tensor, z: Tensor) -> Tensor:
        """Return ``P^T P z``, which is z without its part in the null space of P."""
        return self._isometry(factors, z)

    def _isometry(self, factors: Sequence[Tensor], z: Tensor) -> Tensor:
        """Return ``P^T P z``."""
        z = self.matrix.times(z)
        for factor in reversed(factors):
            z = factor @ z
        return self.matrix.times(z)


def root_of_gram_float32(gram: Tensor, gram_of_images: Callable[[Tensor], Tensor]) -> InverseRoot:
    """Return the inverse root of a Gram matrix ``X^T X`` (k, k), float64, of full rank, by float32 eigenvectors.

    Args:
        gram: ``X^T X``.
        gram_of_images: returns ``(X z)^T (X z)`` (j, j), float64, of z (k, j). Of vectors with small images it has
            smaller errors than `gram`.

    Raises:
        ConvergenceError: too many small eigenvalues, one that may be zero, or the decomposition failed.
    """
    values, Q = eigh(gram.float())
    largest = float(values[-1])
    cut = int((values < SMALL_EIGENVALUE * largest).sum())
    if largest <= 0 or cut > FEW * len(values):
        raise ConvergenceError(f"gram-float32: {cut} of {len(values)} eigenvalues of the basis are small")
    rest, kept = Q[:, cut:], values[cut:]
    smallest = float(kept[0])
    V = left = gram[:, :0]
    if cut:
        small, V = _small_eigenspace(gram, gram_of_images, Q[:, :cut], rest, kept)
        smallest = float(small[0])
        if smallest <= RESOLVED_FROM_IMAGES * largest:
            raise ConvergenceError(
                f"gram-float32: an eigenvalue of the basis is {smallest / largest:.0e} of the largest"
            )
        left = V * small.rsqrt()
        narrow = V.float()
        rest.addmm_(narrow, narrow.mT @ rest, alpha=-1)
    bulk = torch.empty_like(Q)
    add_gram(bulk, rest.mul_(kept.rsqrt().sqrt()).mT, fresh=True)
    root = (largest / smallest) ** 0.5
    matrix = SplitMatrix(bulk, left, V.mT)
    return InverseRoot(
        matrix,
        rank=len(values),
        condition=root,
        largest=largest**0.5,
        sensitivity=2 * matrix.row_norms(),
        margin=1 / root - RANK_TOLERANCE,
        rounding=BACKWARD_ERROR * root**2,
        route="gram-float32",
    )


def _small_eigenspace(
    gram: Tensor, gram_of_images: Callable[[Tensor], Tensor], lowest: Tensor, rest: Tensor, kept: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the smallest eigenvalues, rising, and float64 eigenvectors, from float32 ones and those of the rest.

    To first order the basis lacks ``rest^T G V / (kept - values)`` of each other eigenvector. The quotient is limited
    if eigenvalues on both sides of the cut are close: mixing those hardly changes the root.
    """
    V = lowest.double()
    image = gram @ V
    values = (V * image).sum(0)
    residual = (image - V * values).float()
    gaps = kept[:, None] - values.float()
    mixing = (rest.mT @ residual) / gaps.clamp(min=float(kept[0]) / 8)
    V = cholesky_whitened(V - (rest @ mixing).double())
    small, rotation = eigh(gram_of_images(V))
    return small, V @ rotation


def root_of_pair(gram: Tensor, first: int, single: bool) -> InverseRoot:
    """Return the inverse root of a Gram matrix ``[I, C; C^T, I]`` (k, k), float64, of two orthonormal bases.

    If ``C w = s u``, the matrix has the eigenvectors ``(u, w)`` and ``(u, -w)`` with the eigenvalues 1 + s and 1 - s.
    The w are the eigenvectors of ``I - C^T C``, with eigenvalues ``d = (1 + s) (1 - s)``. The root is
    ``[I + C W g(d) W^T C^T, C W o(d) W^T; (C W o(d) W^T)^T, W e(d) W^T]``: e, o and g are the even and odd part of the
    inverse roots of 1 + s and 1 - s, ``o`` over s and ``g = (e - 1) / s^2``.

    Args:
        gram: of both bases.
        first: columns of the first basis; both have some.
        single: whether the root may be float32 but for the part of small eigenvalues.

    Raises:
        ConvergenceError: an eigenvalue may be zero, or the decomposition failed.
    """
    if 2 * first < len(gram):  # the second basis is the smaller one
        order = [*range(first, len(gram)), *range(first)]
        found = root_of_pair(gram[order][:, order], len(gram) - first, single)
        back = [*range(len(gram) - first, len(gram)), *range(len(gram) - first)]
        matrix = SplitMatrix(found.matrix.bulk[back][:, back], found.matrix.left[back], found.matrix.right[:, back])
        return replace(found, matrix=matrix, sensitivity=found.sensitivity[back])
    C = gram[:first, first:].contiguous()
    inner = torch.empty_like(gram[first:, first:])
    add_gram(inner, C, fresh=True)
    d, W = eigh(torch.eye(len(inner), dtype=gram.dtype, device=gram.device) - inner)
    d = d.clamp(max=1)
    s = (1 - d).sqrt()
    smallest, largest = float(d[0] / (1 + s[0])), float(1 + s[0])
    if smallest <= max(RESOLVED, 100 * RANK_TOLERANCE**2) * largest:
        raise ConvergenceError(f"gram-float64: an eigenvalue of the basis is {smallest / largest:.0e} of the largest")
    cut = int((d / (1 + s) < SMALL_EIGENVALUE * largest).sum()) if single else 0
    low = torch.cat([C @ (W[:, :cut] / s[:cut]), -W[:, :cut]]) / 2**0.5
    # Without differences of nearly equal numbers. The eigenvalues 1 - s in `low` are left out.
    plus, minus, root = (1 + s).rsqrt(), ((1 + s) / d).sqrt(), d.sqrt()
    minus[:cut] = 0
    even = (plus + minus) / 2
    odd = -1 / (d * (plus + minus))
    rest = (1 + 2 * root) / (2 * d * (1 + root) * (1 + even))
    odd[:cut], rest[:cut] = even[:cut] / s[:cut], (even[:cut] - 1) / s[:cut] ** 2
    if single:
        C, W, even, odd, rest = (x.float() for x in (C, W, even, odd, rest))
    turned = C @ W
    bulk = W.new_empty(gram.shape)
    bulk[:first, :first] = (turned * rest) @ turned.mT
    bulk[:first, :first].diagonal().add_(1)
    torch.mm(turned * odd, W.mT, out=bulk[:first, first:])
    bulk[first:, :first] = bulk[:first, first:].mT
    bulk[first:, first:] = (W * even) @ W.mT
    matrix = SplitMatrix(bulk, low * ((1 + s[:cut]) / d[:cut]).sqrt(), low.mT)
    condition = (largest / smallest) ** 0.5
    return InverseRoot(
        matrix,
        rank=len(gram),
        condition=condition,
        largest=largest**0.5,
        sensitivity=2 * matrix.row_norms(),
        margin=1 / condition - RANK_TOLERANCE,
        rounding=BACKWARD_ERROR * condition**2,
        route="gram-float64",
    )


def root_of_gram(gram: Tensor, rtol: float = RANK_TOLERANCE) -> InverseRoot:
    """Return the inverse root of a Gram matrix ``X^T X`` (k, k), float64, by its eigenvalues.

    Raises:
        ConvergenceError: an eigenvalue may or may not be zero, or is inexact; or the decomposition failed.
    """
    return root_of_eigenvectors(*every_eigenvector(gram), rtol)


def root_of_eigenvectors(values: Tensor, Q: Tensor, rtol: float = RANK_TOLERANCE) -> InverseRoot:
    """Return the inverse root of a Gram matrix, given its eigenvalues (k,), rising, and eigenvectors (k, k), float64.

    Raises:
        ConvergenceError: as `root_of_gram`.
    """
    largest = float(values[-1]) if len(values) else 0.0
    if largest <= 0:
        return _zero_root(Q, "gram-float64")
    rounding = 8 * len(values) ** 0.5 * torch.finfo(values.dtype).eps
    doubtful = (values > rounding * largest) & (values < max(RESOLVED, 100 * rtol**2) * largest)
    if bool(doubtful.any()) or not float(values[0]) >= -rounding * largest:
        raise ConvergenceError(f"gram-float64: a singular value of the basis is {_smallest(values, doubtful):.0e} of 1")
    squares = values.flip(0).clamp(min=0)
    return _inverse_root(Q.flip(1), squares.sqrt(), max(rounding**0.5, rtol), "gram-float64")


def root_of_factor(R: Tensor, rtol: float = RANK_TOLERANCE) -> InverseRoot:
    """Return the inverse root of ``R^T R`` by the SVD of R (any number of rows, k columns), float64.

    Raises:
        ConvergenceError: the SVD did not converge.
    """
    _, values, Qh = svd(R)
    if not len(values) or not values[0] > 0:
        return _zero_root(R.new_zeros(R.shape[1], R.shape[1]), "svd-float64")
    return _inverse_root(Qh.mT, values, rtol, "svd-float64")


def _inverse_root(Q: Tensor, values: Tensor, rtol: float, route: str) -> InverseRoot:
    """Return the inverse root from right singular vectors and singular values, falling, the first one positive."""
    largest = float(values[0])
    rank = int((values > rtol * largest).sum())
    kept, smallest = Q[:, :rank], float(values[rank - 1])
    dropped = float(values[rank]) if rank < len(values) else 0.0
    bulk = Q.new_empty(len(Q), len(Q))
    add_gram(bulk, (kept * values[:rank].rsqrt()).mT, fresh=True)
    matrix = SplitMatrix.whole(bulk)
    sensitivity = 2 * matrix.row_norms()
    if rank < len(sensitivity):  # errors may rotate the null space as well
        sensitivity = sensitivity.clamp(min=2 / max(smallest - dropped, torch.finfo(values.dtype).tiny))
    powers = 2 if route == "gram-float64" else 1
    return InverseRoot(
        matrix,
        rank=rank,
        condition=largest / smallest,
        largest=largest,
        sensitivity=sensitivity,
        margin=float((values / largest - rtol).abs().amin()),
        rounding=BACKWARD_ERROR * largest**powers / max(smallest**powers - dropped**powers, 1e-300),
        route=route,
    )


def _zero_root(gram: Tensor, route: str) -> InverseRoot:
    sensitivity = torch.ones_like(gram.diagonal())
    return InverseRoot(SplitMatrix.whole(torch.zeros_like(gram)), 0, 1.0, 0.0, sensitivity, 1.0, BACKWARD_ERROR, route)


def _smallest(values: Tensor, doubtful: Tensor) -> float:
    return float(values[doubtful].amin() / values[-1]) ** 0.5 if bool(doubtful.any()) else 0.0
