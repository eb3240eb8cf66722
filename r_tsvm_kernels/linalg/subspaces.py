"""Leading singular subspaces of task matrices, and truncated SVDs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import overload

import torch
from torch import Tensor

from ..errors import ShapeError
from ..foreign_devices import on_own_device
from ..text import listed
from .arguments import finite, given_batch, given_ranks
from .certificate import Certificate, Mode, tolerance_of
from .decompositions import frobenius_norm, svd
from .leading_right_vectors import right_vectors
from .orthonormal import orthogonality
from .parallel import run_concurrently
from .ranks import Rank
from .rounding import EPS, Cut
from .tall_matrix import TallMatrix


@dataclass(frozen=True, repr=False)
class Subspaces:
    """Leading singular subspaces and what the matrix does between them: ``D ~ U @ core @ Vh``.

    Unpacks as ``U, core, Vh = leading_subspaces(D, k)``.

    Attributes:
        U: (m, k) float64, orthonormal columns.
        core: (k, k) float64, ``U^T D V``; with `U` and `Vh` determined up to a rotation within each subspace.
        Vh: (k, n) float64, orthonormal rows.
        captured_energy: ``norm(core)^2 / norm(D)^2`` (Frobenius), 1.0 for a zero matrix.
        residual: ``norm(D^T U - V core^T) / norm(D)`` (Frobenius), 0.0 for a zero matrix: how far the subspaces are
            from being invariant; ``D V = U core`` holds to rounding.
        cut: all singular values, and the accuracy of the subspaces.
        value_errors: (min(m, n),) float64, bounds of the errors of the singular values.
        certificate: measured accuracy; its error is that of the subspaces.
    """

    U: Tensor
    core: Tensor
    Vh: Tensor
    captured_energy: float
    residual: float
    cut: Cut
    value_errors: Tensor
    certificate: Certificate

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.U, self.core, self.Vh))

    def __repr__(self) -> str:
        shape = f"{len(self.U)}x{self.Vh.shape[1]}"
        return f"Subspaces({shape}, rank {self.rank}, {self.certificate.verdict})"

    @property
    def nuclear_norm(self) -> float:
        """Sum of all singular values, without those that may be zero."""
        return float(self.cut.values[self.cut.values > self.value_errors].sum())

    @property
    def value_error(self) -> float:
        """Relative error of the nuclear norm, 0.0 for a zero matrix."""
        norm = self.nuclear_norm
        return float(self.value_errors.sum()) / norm if norm else 0.0

    @property
    def rank(self) -> int:
        """Dimension of the subspaces, at most the rank that was asked for."""
        return self.core.shape[0]


@dataclass(frozen=True, repr=False)
class TruncatedSVD:
    """Leading singular triplets of a matrix, or of a batch of matrices.

    Unpacks as ``U, S, Vh = truncated_svd(D, k)``. A batch is padded with zeros to its largest rank.

    Attributes:
        U: (m, k) or (batch, m, k) float64; the first ``ranks[b]`` columns of item b are orthonormal.
        S: (k,) or (batch, k) float64, falling.
        Vh: (k, n) or (batch, k, n) float64; the first ``ranks[b]`` rows of item b are orthonormal.
        ranks: of each matrix, at most the rank asked for.
        certificates: of each matrix.
        cuts: of each matrix, the accuracy of the subspaces.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor
    ranks: tuple[int, ...]
    certificates: tuple[Certificate, ...]
    cuts: tuple[Cut, ...]

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.U, self.S, self.Vh))

    def __repr__(self) -> str:
        shape = f"{self.U.shape[-2]}x{self.Vh.shape[-1]}"
        count = f"{len(self.ranks)} of " if self.U.ndim == 3 else ""
        return f"TruncatedSVD({count}{shape}, {listed(self.ranks)}, {self.certificate.verdict})"

    @property
    def certificate(self) -> Certificate:
        """The certificate of the matrix; the worst one of a batch."""
        return Certificate.worst(self.certificates)


# Type checkers do not see the number of dimensions: for them a tensor is one matrix. Unbind a batch to please them.
@overload
def leading_subspaces(
    matrices: Tensor, ranks: Rank | Sequence[Rank], *, mode: Mode = "exact", routes: Sequence[str] | None = None
) -> Subspaces: ...
@overload
def leading_subspaces(
    matrices: Sequence[Tensor],
    ranks: Rank | Sequence[Rank],
    *,
    mode: Mode = "exact",
    routes: Sequence[str] | None = None,
) -> list[Subspaces]: ...
@on_own_device
def leading_subspaces(
    matrices: Sequence[Tensor] | Tensor,
    ranks: Rank | Sequence[Rank],
    *,
    mode: Mode = "exact",
    routes: Sequence[str] | None = None,
) -> Subspaces | list[Subspaces]:
    """Find the leading left and right singular subspaces of a matrix, or of each of several matrices.

    Ranks are clipped to the numerical rank: beyond it singular vectors are arbitrary, and arbitrary directions would
    reach rows and columns that the fine-tune never touched.

    Args:
        matrices: a matrix (m, n), or several: a list of matrices of any shapes, or a tensor (batch, m, n). float32 or
            float64, finite.
        ranks: dimension of the subspaces, >= 0, or a function of the singular values (see `choose_rank`): one for all
            matrices, or one for each.
        mode: ``exact`` or ``fast``, see `Certificate`.
        routes: solvers to try, the cheapest first, of ``gram-float32``, ``gram-float64`` and ``svd-float64``; None
            chooses by the size of the matrices.

    Returns:
        The subspaces of the matrix, or a list of them for several.

    Raises:
        ShapeError: an argument is not a matrix, the number of ranks differs, or a rank is negative.
        DTypeError: a matrix is not a dense tensor of float32 or float64.
        ConfigError: an unknown mode, or a rank that is not a whole number.
        NonFiniteError: a matrix holds NaN or infinity, or a singular value overflows float64.
        ConvergenceError: no solver was accurate enough.

    Examples:
        >>> matrix = torch.randn(30, 20, generator=torch.Generator().manual_seed(0))
        >>> U, core, Vh = leading_subspaces(matrix, 5)
        >>> U.shape, core.shape, Vh.shape
        (torch.Size([30, 5]), torch.Size([5, 5]), torch.Size([5, 20]))
    """
    tolerance = tolerance_of(mode)
    given, single = given_batch(matrices, "leading_subspaces")
    numbers = given_ranks(ranks, len(given), "leading_subspaces")
    jobs = [
        partial(_subspaces_of, matrix, rank, mode, tolerance, routes)
        for matrix, rank in zip(given, numbers, strict=True)
    ]
    if not jobs:
        return []
    found = run_concurrently(jobs, max(min(matrix.shape) for matrix in given), given[0].device)
    return found[0] if single else found


@on_own_device
def truncated_svd(
    matrices: Sequence[Tensor] | Tensor, ranks: Rank | Sequence[Rank], *, mode: Mode = "exact"
) -> TruncatedSVD:
    """Compute the leading singular triplets of a matrix, or of each of several matrices.

    `leading_subspaces`, and the SVD of each core.

    Args:
        matrices: a matrix (m, n), or several: a list of matrices of one shape, or a tensor (batch, m, n). float32 or
            float64, finite.
        ranks: number of triplets, >= 0, or a function of the singular values (see `choose_rank`): one for all
            matrices, or one for each.
        mode: ``exact`` or ``fast``, see `Certificate`.

    Returns:
        U, S and Vh with the certificate; for several matrices each of them is a batch.

    Raises:
        ShapeError: no matrices, several shapes, another number of ranks, or a negative rank.
        DTypeError: a matrix is not a dense tensor of float32 or float64.
        DeviceError: the matrices are not on one device.
        ConfigError: an unknown mode, or a rank that is not a whole number.
        NonFiniteError: a matrix holds NaN or infinity, or a singular value overflows float64.
        ConvergenceError: no solver was accurate enough.

    Examples:
        >>> U, S, Vh = truncated_svd(torch.diag(torch.tensor([3.0, 2.0, 1.0])), 2)
        >>> S
        tensor([3., 2.], dtype=torch.float64)
        >>> truncated_svd(torch.ones(4, 6, 5), 1).U.shape
        torch.Size([4, 6, 1])
    """
    given, single = given_batch(matrices, "truncated_svd", one_device=True)
    if len({matrix.shape for matrix in given}) != 1:
        raise ShapeError(
            f"truncated_svd: expected matrices of one shape, got {[tuple(matrix.shape) for matrix in given]}; "
            "call leading_subspaces for several shapes"
        )
    parts = leading_subspaces(given, given_ranks(ranks, len(given), "truncated_svd"), mode=mode)
    (m, n), k = given[0].shape, max(part.rank for part in parts)
    U, S, Vh = (parts[0].U.new_zeros(len(parts), *shape) for shape in ((m, k), (k,), (k, n)))
    for item, part in enumerate(parts):
        U[item, :, : part.rank], S[item, : part.rank], Vh[item, : part.rank] = _triplets(part)
    if single:
        U, S, Vh = U[0], S[0], Vh[0]
    numbers, certificates, cuts = zip(*((part.rank, part.certificate, part.cut) for part in parts), strict=True)
    return TruncatedSVD(U, S, Vh, numbers, certificates, cuts)


def _triplets(part: Subspaces) -> tuple[Tensor, Tensor, Tensor]:
    """Return the singular triplets U, S, Vh between the subspaces.

    V mostly are eigenvectors, so that the core is diagonal up to errors like those of LAPACK's SVD.
    """
    core, values = part.core, part.core.diagonal()
    S, order = values.abs().sort(descending=True, stable=True)
    if len(S) and frobenius_norm(core - values.diag()) <= len(S) * EPS * float(S[0]):
        return part.U[:, order] * torch.where(values[order] < 0, -1.0, 1.0), S, part.Vh[order]
    P, S, Qh = svd(core)
    return part.U @ P, S, Qh @ part.Vh


def _subspaces_of(matrix: Tensor, rank: Rank, mode: str, tolerance: float, routes: Sequence[str] | None) -> Subspaces:
    return find_subspaces(TallMatrix(matrix), rank, mode, tolerance, routes)


def find_subspaces(
    tall: TallMatrix, rank: Rank, mode: str, tolerance: float, routes: Sequence[str] | None = None
) -> Subspaces:
    """Find the subspaces of one matrix: `leading_subspaces`."""
    found = right_vectors(tall, rank, mode, routes)
    V = found.V
    (m, _), k = tall.shape, V.shape[1]
    image = V.new_empty(m, k)
    for rows, tile in tall.tiles(torch.float64):
        image[rows] = tile @ V
    U, core = torch.linalg.qr(image)
    norm = tall.squared_norm**0.5
    residual = energy = 0.0
    if norm == 0.0:
        energy = 1.0
    elif k:
        back = torch.zeros_like(V)
        for rows, tile in tall.tiles(torch.float64):
            back.addmm_(tile.mT, U[rows])
        residual = float(torch.linalg.vector_norm(back - V @ core.mT)) / norm
        energy = min(1.0, float(core.square().sum()) / tall.squared_norm)
    core = finite(core / tall.scale, "leading_subspaces")
    defect = max(float(orthogonality(basis)) for basis in (U, V))
    error, arbitrary = found.cut.error(left=True)
    if not error + defect <= tolerance:
        error, arbitrary = found.cut.error(allowed=tolerance / 2, left=True)
    certificate = Certificate(
        error=error + defect,
        orthogonality=defect,
        subspace_error=error,
        tolerance=tolerance,
        route=found.route,
        gap=found.cut.gap,
        arbitrary=arbitrary,
        escalations=found.escalations,
    )
    certificate.require()
    if tall.transposed:
        U, core, V = V, core.mT, U
    return Subspaces(U, core, V.mT, energy, residual, found.cut, found.value_errors, certificate)
