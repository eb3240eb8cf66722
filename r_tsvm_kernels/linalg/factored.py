"""Matrices given as a product of two thin ones, such as LoRA updates: merged without forming a task matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import DeviceError, DTypeError, ShapeError
from .certificate import Certificate, Mode, tolerance_of
from .decompositions import svd
from .interference import interference_of_gram
from .inverse_root import root_of_factor
from .orthonormal import thin_qr
from .polar import isometry_defect
from .ranks import Rank


@dataclass(frozen=True)
class Factored:
    """The matrix ``scale * left @ right``.

    Attributes:
        left: (m, r), float32, float64, float16 or bfloat16; ``lora_B`` of a LoRA adapter.
        right: (r, n), of the same dtype and device; ``lora_A``.
        scale: ``lora_alpha / r``, or over ``sqrt(r)`` for rank-stabilised LoRA.
    """

    left: Tensor
    right: Tensor
    scale: float = 1.0

    def __post_init__(self) -> None:
        left, right = self.left, self.right
        if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[0]:
            raise ShapeError(f"Factored: expected (m, r) and (r, n), got {tuple(left.shape)} and {tuple(right.shape)}")
        if left.dtype != right.dtype or not left.dtype.is_floating_point:
            raise DTypeError(f"Factored: expected two factors of one float dtype, got {left.dtype} and {right.dtype}")
        if left.device != right.device:
            raise DeviceError(f"Factored: factors on {left.device} and {right.device}; move them with .to()")

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of the product."""
        return self.left.shape[0], self.right.shape[1]

    def to(self, device: str | torch.device, *, non_blocking: bool = False) -> Factored:
        """Return the product with its factors on another device."""
        left, right = (factor.to(device, non_blocking=non_blocking) for factor in (self.left, self.right))
        return Factored(left, right, self.scale)

    def dense(self) -> Tensor:
        """Return the product (m, n), float32 (float64 if the factors are), formed in that dtype."""
        dtype = torch.float64 if self.left.dtype == torch.float64 else torch.float32
        return (self.left.to(dtype) * self.scale) @ self.right.to(dtype)

    def norm(self) -> float:
        """Return the Frobenius norm of the product, from Gram matrices of the factors in float64."""
        left, right = self.left.double(), self.right.double()
        square = float(((left.mT @ left) * (right @ right.mT)).sum())
        return abs(self.scale) * math.sqrt(max(square, 0.0))


@dataclass(frozen=True)
class FactoredMerge:
    """The merged update, still factored, and what was measured on the way.

    Attributes:
        update: of rank at most ``sum(ranks)``, float64.
        ranks: rank used per task: what was asked for, clipped to the numerical rank of the product.
        captured_energy: per task, fraction of the squared Frobenius norm inside the subspaces that were kept.
        certificate: measured accuracy.
        interference: see `TsvMerge`.
    """

    update: Factored
    ranks: tuple[int, ...]
    captured_energy: tuple[float, ...]
    certificate: Certificate
    interference: tuple[float, float]


def merge_factored(
    matrices: Sequence[Factored], ranks: Sequence[Rank], weights: Sequence[float], mode: Mode = "exact"
) -> FactoredMerge:
    """Merge factored task matrices by TSV-Merge; see `tsv_merge`, which calls this.

    Each factor's thin QR reduces a task to a core of its inner dimension, whose SVD gives the subspaces; everything
    is float64. Costs O((m + n) (sum r_t)^2).

    Args:
        matrices: T factored matrices of one shape, on one device.
        ranks: T ranks >= 0, or functions of the singular values, padded with zeros to min(m, n).
        weights: T factors of the cores.
        mode: ``exact`` or ``fast``, see `Certificate`.

    Raises:
        ConfigError: an unknown mode.
        ConvergenceError: a decomposition failed.
    """
    tolerance = tolerance_of(mode)
    bases_left, bases_right, cores, energies = [], [], [], []
    for matrix, rank, weight in zip(matrices, ranks, weights, strict=True):
        U, values, Vh, energy = leading_triplets(matrix, rank)
        bases_left.append(U)
        bases_right.append(Vh.mT)
        cores.append(weight * values)
        energies.append(energy)
    U, V = torch.cat(bases_left, dim=1), torch.cat(bases_right, dim=1)
    R_left, R_right = (torch.linalg.qr(basis, mode="r").R for basis in (U, V))
    left, right = root_of_factor(R_left), root_of_factor(R_right)
    P, Q = left.matrix.after(U), right.matrix.after(V)
    defect = max(isometry_defect(left, P.mT @ P), isometry_defect(right, Q.mT @ Q))
    certificate = Certificate(
        error=defect,
        orthogonality=defect,
        subspace_error=0.0,
        tolerance=tolerance,
        route="factored-float64",
        basis_rank=(left.rank, right.rank),
        basis_condition=(left.condition, right.condition),
    )
    certificate.require()
    update = Factored(P * torch.cat(cores), Q.mT)
    numbers = tuple(len(core) for core in cores)
    overlaps = tuple(interference_of_gram(R.mT @ R, numbers) for R in (R_left, R_right))
    return FactoredMerge(update, numbers, tuple(energies), certificate, (overlaps[0], overlaps[1]))


def weighted_sum(matrices: Sequence[Factored], weights: Sequence[float]) -> Factored:
    """Return the sum of the products, of the inner dimension of all together, in float64."""
    left = [weight * matrix.scale * matrix.left.double() for matrix, weight in zip(matrices, weights, strict=True)]
    return Factored(torch.cat(left, dim=1), torch.cat([matrix.right.double() for matrix in matrices]))


def leading_triplets(matrix: Factored, rank: Rank) -> tuple[Tensor, Tensor, Tensor, float]:
    """Return the leading singular triplets of the product and the share of the energy they hold, in float64.

    Two thin QRs and the SVD of a core of the inner dimension; the product is never formed. Its rows and columns of
    zeros stay so, to the bit.

    Args:
        matrix: (m, n).
        rank: >= 0, or a function of the singular values, padded with zeros to min(m, n); clipped to the numerical rank.

    Returns:
        U (m, k), the singular values (k,), falling, Vh (k, n), and the share of the squared Frobenius norm they hold.

    Raises:
        ConvergenceError: the SVD failed.
    """
    Q_left, R_left = thin_qr(matrix.left.double())
    Q_right, R_right = thin_qr(matrix.right.double().mT)
    P, values, Qh = svd(R_left @ R_right.mT * matrix.scale)
    padded = torch.cat([values, values.new_zeros(max(0, min(matrix.shape) - len(values)))])
    wanted = rank if isinstance(rank, int) else rank(padded)
    norm = float(torch.linalg.vector_norm(values))
    k = min(wanted, int((values > 2.0**-46 * norm).sum()))
    energy = float(values[:k].square().sum()) / norm**2 if norm else 1.0
    return Q_left @ P[:, :k], values[:k], Qh[:k] @ Q_right.mT, min(1.0, energy)
