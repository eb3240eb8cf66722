"""Common bases of the task matrices of one weight: of their columns (KnOTS), or of both sides (Core Space)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import ShapeError
from .arguments import given_matrices
from .certificate import Certificate, Mode, tolerance_of
from .decompositions import frobenius_norm, svd
from .eigenspaces import MEASURED, PROBES
from .factored import Factored, check_factored
from .on_device import gaussian
from .orthonormal import orthogonality, thin_qr
from .rounding import BACKWARD_ERROR, Cut
from .subspaces import truncated_svd


@dataclass(frozen=True, repr=False)
class JointSvd:
    """The SVD of task matrices put side by side, ``[D_1 .. D_T] = U [P_1 .. P_T]``; float64.

    Attributes:
        U: (m, k) orthonormal columns, k the numerical rank.
        parts: T matrices ``diag(S) V_t`` (k, n), with V_t the columns of the right singular vectors that belong to D_t.
        rest: T matrices (m, 16): the parts of the task matrices outside the basis, times random vectors.
        certificate: how much of the task matrices the basis holds, and whether its directions are arbitrary: equal
            singular values determine only the span of their directions, and element-wise methods depend on these.
    """

    U: Tensor
    parts: list[Tensor]
    rest: list[Tensor]
    certificate: Certificate

    def __repr__(self) -> str:
        m, k = self.U.shape
        parts = ", ".join(f"{k}x{part.shape[1]}" for part in self.parts)
        return f"JointSvd(U {m}x{k}, parts {parts}, {self.certificate.verdict})"


@dataclass(frozen=True, repr=False)
class CoreSpace:
    """Task matrices in common bases: ``D_t = left @ cores[t] @ right`` up to rounding; float64.

    Attributes:
        left: (m, p); p is the sum of the inner dimensions, at most m. Columns are orthonormal where a core has a
            nonzero row. A row that is zero in all task matrices is zero here too.
        cores: T matrices (p, q).
        right: (q, n); q is the sum of the inner dimensions, at most n. Rows are orthonormal where a core has a nonzero
            column.
        error: change of the task matrices by rounding, relative to the norm of all of them.
    """

    left: Tensor
    cores: list[Tensor]
    right: Tensor
    error: float

    def __repr__(self) -> str:
        (m, p), (q, n) = self.left.shape, self.right.shape
        return f"CoreSpace({len(self.cores)} cores {p}x{q} of {m}x{n}, error {self.error:.0e})"


def joint_svd(matrices: Sequence[Tensor] | Sequence[Factored] | Tensor, *, mode: Mode = "exact") -> JointSvd:
    """Decompose task matrices put side by side (Stoica et al., "KnOTS", arXiv 2410.19735, section 4).

    Products are not formed: ``[D_1 .. D_T] = Q [(Q^T B_1) A_1 .. (Q^T B_T) A_T]`` with a basis Q of all B_t, of at most
    R = sum(r_t) columns; O((m + T n) R^2) operations.

    Args:
        matrices: T matrices of one height (m, n_t), float32 or float64, or all `Factored`.
        mode: ``exact`` or ``fast``, see `Certificate`; products are always exact.

    Returns:
        The basis U, T parts ``S V_t`` with ``D_t = U (S V_t)``, and the certificate.

    Raises:
        ShapeError: no matrices, several heights, or an argument that is not a matrix.
        DTypeError: a matrix is not a dense tensor of float32 or float64.
        DeviceError: the matrices are not on one device.
        ConfigError: an unknown mode.
        NonFiniteError: a matrix holds NaN or infinity.
        ConvergenceError: no solver was accurate enough.

    Examples:
        >>> generator = torch.Generator().manual_seed(0)
        >>> found = joint_svd([torch.randn(6, 4, generator=generator) for _ in range(2)])
        >>> found.U.shape, found.parts[0].shape
        (torch.Size([6, 6]), torch.Size([6, 4]))
    """
    factors = [matrix for matrix in matrices if isinstance(matrix, Factored)]
    if not factors:
        dense = given_matrices(matrices, "joint_svd", one_device=True)  # type: ignore[arg-type]
        if len({len(matrix) for matrix in dense}) != 1:
            raise ShapeError(f"joint_svd: expected matrices of one height, got {[tuple(m.shape) for m in dense]}")
        joined = torch.cat(dense, dim=1)
        found = truncated_svd(joined, min(joined.shape), mode=mode)
        U, certificate, (cut,) = found.U, found.certificate, found.cuts
        del joined, found
        parts = [_clean(U.mT @ matrix.double()) for matrix in dense]
        return _measured(certificate, cut, U, parts, dense)
    if len(factors) != len(matrices) or len({factor.shape[0] for factor in factors}) != 1:
        raise ShapeError(f"joint_svd: expected products of one height, got {[tuple(m.shape) for m in matrices]}")
    lefts = torch.cat([factor.left.double() for factor in factors], dim=1)
    Q, _ = thin_qr(lefts)
    parts = [factor.scale * (Q.mT @ factor.left.double()) @ factor.right.double() for factor in factors]
    R = torch.linalg.qr(torch.cat(parts, dim=1).mT, mode="r").R
    P, values, _ = svd(R.mT)
    P = P[:, values > 2.0**-46 * frobenius_norm(values)]
    cut = Cut(values, P.shape[1])
    parts = [_clean(P.mT @ part) for part in parts]
    certificate = Certificate(BACKWARD_ERROR, BACKWARD_ERROR, 0.0, tolerance_of(mode), "factored-float64")
    return _measured(certificate, cut, Q @ P, parts, factors)


def _measured(
    certificate: Certificate,
    cut: Cut,
    U: Tensor,
    parts: list[Tensor],
    matrices: Sequence[Tensor | Factored],
) -> JointSvd:
    """Measure on random vectors how much of the task matrices the basis holds."""
    images: list[float] = []
    rest: list[Tensor] = []
    for matrix, part in zip(matrices, parts, strict=True):
        z = gaussian(part.shape[1], PROBES, U.device)
        image = _times(matrix, z)
        images.append(frobenius_norm(image))
        rest.append(image - U @ (part @ z))
    lost = MEASURED * math.hypot(*map(frobenius_norm, rest)) / math.hypot(*images) if any(images) else 0.0
    error, arbitrary = lost + certificate.orthogonality + BACKWARD_ERROR, not cut.mixing <= certificate.tolerance
    return JointSvd(U, parts, rest, replace(certificate, error=error, gap=cut.gap, arbitrary=arbitrary))


def _times(matrix: Tensor | Factored, z: Tensor) -> Tensor:
    if isinstance(matrix, Factored):
        return matrix.scale * (matrix.left.double() @ (matrix.right.double() @ z))
    return matrix.double() @ z


def core_space(matrices: Sequence[Factored]) -> CoreSpace:
    """Find common bases of all columns and of all rows, and the core of each task between them.

    The bases are the singular vectors of all ``left`` side by side, and of all ``right`` one above the other, without
    their scales: those belong to the cores (Panariello et al., "Core Space", arXiv 2509.17786, section 3). Products are
    not formed; O((m + n) R^2) operations, R the sum of the inner dimensions.

    Args:
        matrices: T factored matrices of one shape, on one device.

    Returns:
        Both bases and the cores, float64.

    Raises:
        DTypeError: a matrix is not factored.
        ShapeError: no matrices, or several shapes.
        NonFiniteError: a factor holds NaN or infinity.
        ConvergenceError: an SVD failed.

    Examples:
        >>> core_space([Factored(torch.randn(6, 1), torch.randn(1, 4)) for _ in range(3)])
        CoreSpace(3 cores 3x3 of 6x4, error ...)
    """
    check_factored(matrices, "core_space")
    lefts = [matrix.left.double() for matrix in matrices]
    rights = [matrix.right.double() for matrix in matrices]
    left, right = _basis(torch.cat(lefts, dim=1)), _basis(torch.cat(rights).mT).mT
    whole = [
        matrix.scale * (left.mT @ B) @ (A @ right.mT) for matrix, B, A in zip(matrices, lefts, rights, strict=True)
    ]
    cores = [_clean(core.clone()) for core in whole]
    norm, removed = (
        math.hypot(*(frobenius_norm(part) for part in parts))
        for parts in (whole, [core - kept for core, kept in zip(whole, cores, strict=True)])
    )
    # `_basis` also clears rows of null vectors. These directions are not orthonormal, but no core uses them.
    rows, columns = (torch.stack([core.any(side) for core in cores]).any(0) for side in (1, 0))
    used = left[:, rows], right[columns].mT
    defect = sum(float(orthogonality(basis)) * math.sqrt(basis.shape[1]) for basis in used)
    return CoreSpace(left, cores, right, (removed / norm if norm else 0.0) + defect + BACKWARD_ERROR)


def _clean(part: Tensor) -> Tensor:
    """Set rounding errors to zero: TIES averages over all tasks with a nonzero element, however small."""
    return part.masked_fill_(part.abs() <= 2.0**-46 * frobenius_norm(part), 0)


def _basis(columns: Tensor) -> Tensor:
    """Return all left singular vectors; rows of zeros stay zero to the bit."""
    m, n = columns.shape
    if m < n:  # the left singular vectors of L in ``columns = L Q``
        vectors = svd(torch.linalg.qr(columns.mT, mode="r").R.mT)[0]
    else:
        Q, R = torch.linalg.qr(columns)
        vectors = Q @ svd(R)[0]
    return vectors * columns.any(1)[:, None]
