"""Orthonormal bases by Cholesky factorisations in float64: matrix products and triangular solves where they suffice."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ConvergenceError


def cholesky_qr(Y: Tensor, passes: int = 3, shift: float = 2.0**-50) -> tuple[Tensor, Tensor]:
    """Return ``Q, R`` with ``Q R = Y``: Q has orthonormal columns, R is upper triangular.

    Shifted CholeskyQR (Fukaya et al., SIAM J. Sci. Comput. 42, 2020): the first pass adds a shift to the Gram matrix
    and so succeeds for any condition number; three passes give an orthonormal Q up to condition 1e15, two up to about
    1e8, and one makes Q well-conditioned only. It does not wait for the device. A failure shows in ``Q^T Q``.

    Args:
        Y: (..., m, k), computed in float64.
        passes: number of factorisations, at least 1.
        shift: of the first Gram matrix, relative to its trace; it can be less for columns that are nearly orthogonal.
    """
    Q, R = Y.double(), None
    for _ in range(passes):
        gram = upper_gram(Q)
        if R is None:
            diagonal = gram.diagonal(dim1=-2, dim2=-1)
            trace = diagonal.sum(-1, keepdim=True).clamp(min=torch.finfo(Q.dtype).tiny / shift)
            diagonal.add_(trace, alpha=shift)
        upper = torch.linalg.cholesky_ex(gram, upper=True).L
        Q = torch.linalg.solve_triangular(upper, Q, upper=True, left=False)
        R = upper if R is None else upper @ R
    assert R is not None
    return Q, R


# From this number of columns on, a Gram matrix is computed in so many block rows.
BLOCKED_FROM, BLOCKS = 1024, 4


def upper_gram(X: Tensor) -> Tensor:
    """Return the upper triangle of ``X^T X`` (..., k, k); below the diagonal is something else.

    Of a wide matrix, most of the lower triangle is not computed: 5/8 of the operations.
    """
    k = X.shape[-1]
    if k < BLOCKED_FROM:
        return X.mT @ X
    gram = X.new_zeros(*X.shape[:-2], k, k)
    for block in range(BLOCKS):
        first, last = block * k // BLOCKS, (block + 1) * k // BLOCKS
        gram[..., first:last, first:] = X[..., first:last].mT @ X[..., first:]
    return gram


def thin_qr(Y: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``Q, R`` with ``Q R = Y``, Q with orthonormal columns, and with a row of zeros wherever `Y` has one.

    CholeskyQR2 (Yamamoto et al., ETNA 44, 2015) of the columns scaled to norm 1: as exact as Householder reflections,
    and faster for thin matrices. If ``Q^T Q`` shows a failure (nearly dependent columns, or values that are not
    finite), LAPACK computes the result. For dependent columns only their span is certain to be orthonormal: ``Q P``,
    with P the singular vectors of R for values above rounding.

    Args:
        Y: (m, n) float64.

    Returns:
        Q (m, min(m, n)) and the upper triangular R (min(m, n), n), float64.
    """
    if Y.shape[1] <= Y.shape[0]:
        norms = torch.linalg.vector_norm(Y, dim=0)
        Q, R = cholesky_qr(Y / norms, passes=2)
        if bool(orthogonality(Q) < 16 * torch.finfo(Q.dtype).eps):
            return Q, R * norms
    Q, R = torch.linalg.qr(Y)
    return Q * Y.any(1)[:, None], R


def cholesky_whitened(V: Tensor) -> Tensor:
    """Return an orthonormal basis of the columns of `V`, which must be nearly orthogonal; it is close to `V`.

    Raises:
        ConvergenceError: the columns are linearly dependent.
    """
    L, failed = torch.linalg.cholesky_ex(V.mT @ V)
    if int(failed):
        raise ConvergenceError(f"the columns of a {tuple(V.shape)} basis are linearly dependent")
    whitened: Tensor = torch.linalg.solve_triangular(L.mT, V, upper=True, left=False)
    return whitened


def orthogonality(Q: Tensor) -> Tensor:
    """Return the largest entry of ``|Q^T Q - I|`` for each matrix, in the dtype of `Q`."""
    defect = Q.mT @ Q
    defect.diagonal(dim1=-2, dim2=-1).sub_(1)
    return defect.abs().amax((-2, -1)) if Q.shape[-1] else defect.new_zeros(Q.shape[:-2])
