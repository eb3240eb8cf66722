"""The polar factor: the nearest matrix with orthonormal columns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor

from ..errors import ConfigError, ConvergenceError
from ..foreign_devices import on_own_device
from ..text import kind_of
from .arguments import finite_number, given_batch
from .certificate import Certificate, Mode, tolerance_of
from .inverse_root import RANK_TOLERANCE, InverseRoot, root_of_eigenvectors, root_of_factor, root_of_gram
from .ranks import Rank
from .rounding import BACKWARD_ERROR
from .subspaces import Subspaces, find_subspaces
from .tall_matrix import TallMatrix, add_gram


@dataclass(frozen=True, repr=False)
class PolarFactor:
    """The canonical polar factor of a matrix and what was measured on the way.

    Attributes:
        matrix: (m, n) float64; a partial isometry of rank `rank`.
        rank: number of singular values above the tolerance.
        condition: largest over smallest kept singular value, 1.0 for a zero matrix.
        certificate: its error is the defect of orthonormality.
    """

    matrix: Tensor
    rank: int
    condition: float
    certificate: Certificate

    def __repr__(self) -> str:
        return f"PolarFactor({kind_of(self.matrix)}, rank {self.rank}, {self.certificate.verdict})"


# Type checkers do not see the number of dimensions and take a tensor for one matrix. For them, unbind a batch.
@overload
def polar(matrices: Tensor, *, mode: Mode = "exact", rtol: float = RANK_TOLERANCE) -> PolarFactor: ...
@overload
def polar(matrices: Sequence[Tensor], *, mode: Mode = "exact", rtol: float = RANK_TOLERANCE) -> list[PolarFactor]: ...
@on_own_device
def polar(
    matrices: Sequence[Tensor] | Tensor, *, mode: Mode = "exact", rtol: float = RANK_TOLERANCE
) -> PolarFactor | list[PolarFactor]:
    """Compute the canonical polar factor ``P Q^T`` of a matrix ``P S Q^T``, or of each of several matrices.

    At full rank it is the nearest matrix with orthonormal columns (or rows): the solution of the orthogonal Procrustes
    problem in TSV-Merge (Gargiulo et al., CVPR 2025). Singular values up to `rtol` times the largest count as zero, and
    their directions are left out. The factor is then a partial isometry with the range of the matrix; null vectors to
    complete it would be arbitrary.

    Args:
        matrices: a matrix (m, n), or several: a list of matrices of any shapes, or a tensor (batch, m, n). float32 or
            float64, finite.
        mode: ``exact`` or ``fast``, see `Certificate`.
        rtol: in [0, 1); relative tolerance up to which a singular value counts as zero.

    Returns:
        The factor of the matrix, or a list of factors for several.

    Raises:
        ShapeError: an argument is not a matrix.
        DTypeError: a matrix is not a dense tensor of float32 or float64.
        ConfigError: an unknown mode, or `rtol` out of range.
        NonFiniteError: a matrix holds NaN or infinity.
        ConvergenceError: no solver was accurate enough.

    Examples:
        >>> factor = polar(torch.tensor([[2.0, 0.0], [0.0, -3.0]]))
        >>> torch.allclose(factor.matrix, torch.tensor([[1.0, 0.0], [0.0, -1.0]], dtype=torch.float64))
        True
        >>> len(polar(torch.randn(5, 4, 3)))
        5
    """
    tolerance = tolerance_of(mode)
    if not 0 <= finite_number(rtol, "polar: rtol") < 1:
        raise ConfigError(f"polar: rtol must be in [0, 1), got {rtol}")
    given, single = given_batch(matrices, "polar")
    factors = [_factorize(TallMatrix(matrix), float(rtol), tolerance) for matrix in given]
    return factors[0] if single else factors


def polar_and_subspaces(matrix: Tensor, rank: Rank, mode: Mode = "exact") -> tuple[PolarFactor, Subspaces]:
    """Return `polar` and `leading_subspaces` of a matrix, from one decomposition if that is accurate enough for both.

    Args:
        matrix: (m, n), float32 or float64, finite.
        rank: dimension of the subspaces, or a rule, see `leading_subspaces`.
        mode: ``exact`` or ``fast``.

    Raises:
        ConfigError: an unknown mode.
        NonFiniteError: the matrix holds NaN or infinity.
        ConvergenceError: no solver was accurate enough.
    """
    tolerance, tall = tolerance_of(mode), TallMatrix(matrix)
    with suppress(ConvergenceError):
        tall.decompose()
    return _factorize(tall, RANK_TOLERANCE, tolerance), find_subspaces(tall, rank, mode, tolerance)


def _factorize(tall: TallMatrix, rtol: float, tolerance: float) -> PolarFactor:
    escalations: tuple[str, ...] = ()
    try:
        if tall.eigenvectors is not None:
            root = root_of_eigenvectors(*tall.eigenvectors, rtol)
        else:
            root = root_of_gram(tall.gram(torch.float64), rtol)
    except ConvergenceError as failure:
        escalations = (str(failure),)
        root = root_of_factor(tall.triangular_factor(), rtol)
    P = torch.cat([root.matrix.after(tile) for _, tile in tall.tiles(torch.float64)] or [tall.matrix.double()])
    gram = P.new_empty(P.shape[1], P.shape[1])
    add_gram(gram, P, fresh=True)
    defect = isometry_defect(root, gram)
    certificate = Certificate(
        error=defect + root.rounding,
        orthogonality=defect,
        subspace_error=0.0,
        tolerance=tolerance,
        route=root.route,
        basis_rank=(root.rank, root.rank),
        basis_condition=(root.condition, root.condition),
        arbitrary=root.margin <= BACKWARD_ERROR,
        escalations=escalations,
    )
    certificate.require()
    return PolarFactor(P.mT if tall.transposed else P, root.rank, root.condition, certificate)


def isometry_defect(root: InverseRoot, gram: Tensor) -> float:
    """Return ``norm(P^T P - I) / sqrt(rank)`` (Frobenius), with ``P^T P P^T P - P^T P`` for a partial isometry.

    The inverse root is symmetric, so that this bounds the relative error of the polar factor outside its null space.

    Args:
        root: of the matrix.
        gram: ``P^T P`` (k, k).
    """
    if root.rank == 0:
        return 0.0
    full = root.rank == gram.shape[0]
    defect = gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device) if full else gram @ gram - gram
    return float(torch.linalg.vector_norm(defect)) / math.sqrt(root.rank)
