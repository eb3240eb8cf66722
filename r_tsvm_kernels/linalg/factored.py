"""Matrices given as a product of two thin ones, such as LoRA updates: merged without forming a task matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import DeviceError, DTypeError, NonFiniteError, ShapeError
from ..ops import FLOAT_DTYPES
from .arguments import dense, finite, finite_number, given_ranks, given_weights, whole_number
from .certificate import Certificate, Mode, tolerance_of
from .decompositions import near_one, svd
from .merge_accuracy import WeightedCores, polar_pair
from .orthonormal import thin_qr
from .ranks import Rank
from .rounding import BACKWARD_ERROR, Cut


@dataclass(frozen=True)
class Factored:
    """The matrix ``scale * left @ right``.

    Attributes:
        left: (m, r), float32, float64, float16 or bfloat16; ``lora_B`` of a LoRA adapter.
        right: (r, n), of the same dtype and device; ``lora_A``.
        scale: ``lora_alpha / r``, or over ``sqrt(r)`` for rank-stabilised LoRA.

    The factors are cut off from the graph of gradients.

    Raises:
        ShapeError: not two matrices that can be multiplied.
        DTypeError: not dense tensors of one of these dtypes.
        DeviceError: not on one device.
        ConfigError: `scale` is not a finite number.
    """

    left: Tensor
    right: Tensor
    scale: float = 1.0

    def __post_init__(self) -> None:
        left, right = (dense(factor, "Factored", meta=True) for factor in (self.left, self.right))
        object.__setattr__(self, "left", left)
        object.__setattr__(self, "right", right)
        object.__setattr__(self, "scale", finite_number(self.scale, "Factored: scale"))
        if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[0]:
            raise ShapeError(f"Factored: expected (m, r) and (r, n), got {tuple(left.shape)} and {tuple(right.shape)}")
        if left.dtype != right.dtype or left.dtype not in FLOAT_DTYPES:
            raise DTypeError(f"Factored: expected factors of one float dtype, got {left.dtype} and {right.dtype}")
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
        (left, of_left), (right, of_right) = near_one(self.left), near_one(self.right)
        square = float(((left.mT @ left) * (right @ right.mT)).sum())
        norm = torch.tensor(abs(self.scale) * math.sqrt(max(square, 0.0)), dtype=torch.float64)
        return float(_times_power(norm, of_left + of_right))


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
    matrices: Sequence[Factored],
    ranks: Sequence[Rank] | Rank,
    weights: Sequence[float] | float | None = None,
    mode: Mode = "exact",
) -> FactoredMerge:
    """Merge factored task matrices by TSV-Merge; see `tsv_merge`, which calls this.

    Each factor's thin QR reduces a task to a core of its inner dimension, whose SVD gives the subspaces; everything
    is float64. Costs O((m + n) (sum r_t)^2).

    Args:
        matrices: T factored matrices of one shape, on one device.
        ranks: T ranks >= 0, or functions of the singular values, padded with zeros to min(m, n); one alone is for all.
        weights: T factors of the cores; one alone is for all, None means 1.
        mode: ``exact`` or ``fast``, see `Certificate`.

    Raises:
        ShapeError: no matrices or several shapes, another number of ranks or weights, or a negative rank.
        DTypeError: a matrix is not factored, or its factors hold no data.
        ConfigError: an unknown mode, a rank that is not a whole number, or a weight that is not finite.
        NonFiniteError: a factor holds NaN or infinity, or the result goes beyond float64.
        ConvergenceError: a decomposition failed.
    """
    tolerance = tolerance_of(mode)
    check_factored(matrices, "merge_factored")
    numbers = given_ranks(ranks, len(matrices), "merge_factored")
    factors = given_weights(weights, len(matrices), "merge_factored")
    found = [leading_triplets(matrix, rank) for matrix, rank in zip(matrices, numbers, strict=True)]
    cores = WeightedCores([torch.diag(part.S) for part in found], factors)
    bases = polar_pair(
        [part.U for part in found],
        [part.Vh.mT for part in found],
        [part.cut for part in found],
        cores,
        tolerance=tolerance,
        route="factored-float64",
        rounding=BACKWARD_ERROR,
        exact=True,
    )
    weighted = torch.cat([weight * part.S for weight, part in zip(factors, found, strict=True)])
    update = Factored(finite(bases.left * weighted, "merge_factored"), bases.right.mT)
    used, energies = (tuple(len(part.S) for part in found), tuple(part.captured_energy for part in found))
    return FactoredMerge(update, used, energies, bases.certificate, bases.interference)


def check_factored(matrices: Sequence[Factored], op: str) -> None:
    """Require factored matrices of one shape.

    Raises:
        DTypeError: one is not factored, or its factors hold no data.
        ShapeError: none, or several shapes.
    """
    for matrix in matrices:
        if not isinstance(matrix, Factored):
            raise DTypeError(f"{op}: expected Factored, got {type(matrix).__name__}; give it as two factors")
        dense(matrix.left, op)
    if len({matrix.shape for matrix in matrices}) != 1:
        raise ShapeError(f"{op}: expected matrices of one shape, got {[matrix.shape for matrix in matrices]}")


def weighted_sum(matrices: Sequence[Factored], weights: Sequence[float]) -> Factored:
    """Return the sum of the products, of the inner dimension of all together, in float64."""
    left = [weight * matrix.scale * matrix.left.double() for matrix, weight in zip(matrices, weights, strict=True)]
    return Factored(torch.cat(left, dim=1), torch.cat([matrix.right.double() for matrix in matrices]))


@dataclass(frozen=True)
class Triplets:
    """Leading singular triplets of a product, float64.

    Attributes:
        U: (m, k) orthonormal columns.
        S: (k,) singular values, falling.
        Vh: (k, n) orthonormal rows.
        captured_energy: share of the squared Frobenius norm that they hold.
        cut: how well the subspaces are known.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor
    captured_energy: float
    cut: Cut

    @property
    def certificate(self) -> Certificate:
        """Accuracy of the subspaces, in ``exact`` mode."""
        tolerance = tolerance_of("exact")
        error, arbitrary = self.cut.error(left=True)
        if not error <= tolerance:
            error, arbitrary = self.cut.error(allowed=tolerance / 2, left=True)
        return Certificate(
            error=error,
            orthogonality=BACKWARD_ERROR,
            subspace_error=error,
            tolerance=tolerance,
            route="factored-float64",
            gap=self.cut.gap,
            arbitrary=arbitrary,
        )


def leading_triplets(matrix: Factored, rank: Rank) -> Triplets:
    """Return the leading singular triplets of the product.

    Two thin QRs and the SVD of a core of the inner dimension; the product is never formed. Its rows and columns of
    zeros stay so, to the bit. Singular values that rounding of the sum over the inner dimension can make count as zero.

    Args:
        matrix: (m, n).
        rank: >= 0, or a function of the singular values, padded with zeros to min(m, n); clipped to the numerical rank.

    Raises:
        NonFiniteError: a factor holds NaN or infinity, or the product goes beyond float64.
        ConvergenceError: the SVD failed.
    """
    check_factored([matrix], "leading_triplets")
    (rank,) = given_ranks(rank, 1, "leading_triplets")
    if not all(bool(torch.isfinite(factor).all()) for factor in (matrix.left, matrix.right)):
        raise NonFiniteError(f"a factor of a {matrix.shape} matrix holds NaN or infinity: it has no singular values")
    # In units in which nothing overflows or vanishes but in the product itself.
    (left, of_left), (right, of_right) = near_one(matrix.left), near_one(matrix.right)
    scale, of_scale = math.frexp(matrix.scale)
    Q_left, R_left = thin_qr(left)
    Q_right, R_right = thin_qr(right.mT)
    P, values, Qh = svd(R_left @ R_right.mT * scale)
    padded = torch.cat([values, values.new_zeros(max(0, min(matrix.shape) - len(values)))])
    # What is summed may be larger than the sum.
    summed = torch.linalg.vector_norm(left, dim=0) @ torch.linalg.vector_norm(right, dim=1)
    noise = BACKWARD_ERROR * abs(scale) * float(summed)
    norm = float(torch.linalg.vector_norm(values))
    smallest = max(2.0**-46 * norm, noise)

    def clipped(shift: float) -> int:
        shifted = (padded + shift).clamp(min=0)
        wanted = rank if isinstance(rank, int) else whole_number(rank(shifted), "what a rank rule returns")
        return min(wanted, int((shifted > smallest).sum()))

    ranks = [clipped(shift) for shift in (0.0, noise, -noise)] if norm else [0]  # rules are not asked of zeros
    k, edge = ranks[0], len(set(ranks)) > 1
    largest = float(values[0]) if len(values) else 0.0
    share = noise / largest if largest else 0.0
    energy = float(values[:k].square().sum()) / norm**2 if norm else 1.0
    padded = finite(_times_power(padded, of_left + of_right + of_scale), "leading_triplets")
    cut = Cut(padded, k, spread=share, inherent=share, edge=edge)
    return Triplets(Q_left @ P[:, :k], padded[:k], Qh[:k] @ Q_right.mT, min(1.0, energy), cut)


def _times_power(x: Tensor, power: int) -> Tensor:
    """Return ``2^power x``, infinite or 0 only where that is."""
    power = min(max(power, -2000), 2000)
    half = power // 2
    return x * 2.0**half * 2.0 ** (power - half)
