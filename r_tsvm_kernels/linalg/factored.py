"""Products of two thin matrices, such as LoRA updates, and their merge: the task matrix is never formed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import DeviceError, DTypeError, NonFiniteError, ShapeError
from ..ops._checks import FLOAT_DTYPES
from ..text import listed
from .arguments import dense, finite, finite_number, given_ranks, given_weights, whole_number
from .certificate import Certificate, Mode, tolerance_of
from .decompositions import near_one, svd
from .merge_accuracy import WeightedCores, polar_pair
from .orthonormal import thin_qr
from .ranks import Rank
from .rounding import BACKWARD_ERROR, Cut


@dataclass(frozen=True, repr=False)
class Factored:
    """The matrix ``scale * left @ right``, of factors that are detached from the autograd graph.

    Attributes:
        left: (m, r), float32, float64, float16 or bfloat16; ``lora_B`` of a LoRA adapter.
        right: (r, n), of the same dtype and device; ``lora_A``.
        scale: ``lora_alpha / r``, or over ``sqrt(r)`` for rank-stabilised LoRA.

    Raises:
        ShapeError: the factors are not two matrices that can be multiplied.
        DTypeError: the factors are not dense tensors of one of these dtypes.
        DeviceError: the factors are not on one device.
        ConfigError: `scale` is not a finite number.

    Examples:
        >>> Factored(torch.ones(6, 2), torch.ones(2, 4), scale=0.5)
        Factored(6x4 of rank 2, float32, scale 0.5)
        >>> Factored(torch.ones(6, 2), torch.ones(2, 4), scale=0.5).dense()[0]
        tensor([1., 1., 1., 1.])
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

    def __repr__(self) -> str:
        (m, n), dtype = self.shape, str(self.left.dtype).removeprefix("torch.")
        return f"Factored({m}x{n} of rank {self.left.shape[1]}, {dtype}, scale {self.scale:g})"

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
        norm = torch.tensor(abs(self.scale) * math.sqrt(max(square, 0.0)), dtype=torch.float64, device="cpu")
        return float(_times_power(norm, of_left + of_right))


@dataclass(frozen=True, repr=False)
class FactoredMerge:
    """The merged update, still factored, and what was measured on the way.

    Attributes:
        update: of rank at most ``sum(ranks)``, float64.
        ranks: rank used per task: the rank asked for, clipped to the numerical rank of the product.
        captured_energy: per task, fraction of the squared Frobenius norm inside the subspaces that were kept.
        certificate: measured accuracy.
        interference: see `TsvMerge`.
    """

    update: Factored
    ranks: tuple[int, ...]
    captured_energy: tuple[float, ...]
    certificate: Certificate
    interference: tuple[float, float]

    def __repr__(self) -> str:
        m, n = self.update.shape
        return f"FactoredMerge({m}x{n}, {listed(self.ranks)}, {self.certificate.verdict})"


def merge_factored(
    matrices: Sequence[Factored],
    ranks: Sequence[Rank] | Rank,
    weights: Sequence[float] | Tensor | float | None = None,
    *,
    mode: Mode = "exact",
) -> FactoredMerge:
    """Merge factored task matrices by TSV-Merge; `tsv_merge` calls this.

    The thin QR of each factor reduces a task to a core of its inner dimension; the SVD of the core gives the subspaces.
    All steps are float64. Takes O((m + n) (sum r_t)^2) operations.

    Args:
        matrices: T factored matrices of one shape, on one device.
        ranks: rank >= 0, or a function of the singular values, padded with zeros to min(m, n): one for all tasks, or
            one for each.
        weights: factor of the core: one for all tasks, or one for each; None means 1.
        mode: ``exact`` or ``fast``, see `Certificate`.

    Returns:
        The merged update as two factors, with the ranks, the captured energies and the certificate.

    Raises:
        ShapeError: no matrices or several shapes, another number of ranks or weights, or a negative rank.
        DTypeError: a matrix is not factored, or its factors hold no data.
        ConfigError: an unknown mode, a rank that is not a whole number, or a weight that is not finite.
        NonFiniteError: a factor holds NaN or infinity, or the result overflows float64.
        ConvergenceError: a decomposition failed.

    Examples:
        >>> generator = torch.Generator().manual_seed(0)
        >>> adapters = [
        ...     Factored(torch.randn(40, 4, generator=generator), torch.randn(4, 30, generator=generator))
        ...     for _ in range(2)
        ... ]
        >>> merge_factored(adapters, 4).update
        Factored(40x30 of rank 8, float64, scale 1)
    """
    tolerance = tolerance_of(mode)
    check_factored(matrices, "merge_factored")
    numbers = given_ranks(ranks, len(matrices), "merge_factored")
    factors = given_weights(weights, len(matrices), "merge_factored")
    found = [leading_triplets(matrix, rank) for matrix, rank in zip(matrices, numbers, strict=True)]
    cores = WeightedCores([part.S for part in found], factors)
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
    """Check that all matrices are factored and of one shape.

    Raises:
        DTypeError: a matrix is not factored, or its factors hold no data.
        ShapeError: no matrices, or several shapes.
    """
    for matrix in matrices:
        if not isinstance(matrix, Factored):
            raise DTypeError(f"{op}: expected Factored, got {type(matrix).__name__}; pass Factored(left, right)")
        dense(matrix.left, op)
    if len({matrix.shape for matrix in matrices}) != 1:
        raise ShapeError(f"{op}: expected matrices of one shape, got {[matrix.shape for matrix in matrices]}")


def weighted_sum(matrices: Sequence[Factored], weights: Sequence[float]) -> Factored:
    """Return ``sum(w_t D_t)`` as one product in float64; its inner dimension is the sum of all inner dimensions.

    Args:
        matrices: T factored matrices of one shape.
        weights: T weights.

    Examples:
        >>> weighted_sum([Factored(torch.ones(6, 2), torch.ones(2, 4))] * 3, [0.5, 0.3, 0.2])
        Factored(6x4 of rank 6, float64, scale 1)
    """
    left = [weight * matrix.scale * matrix.left.double() for matrix, weight in zip(matrices, weights, strict=True)]
    return Factored(torch.cat(left, dim=1), torch.cat([matrix.right.double() for matrix in matrices]))


def factored_gram(matrices: Sequence[Factored]) -> Tensor:
    """Return the products ``<D_s, D_t>`` of all matrices (T, T) in float64, without forming them.

    Args:
        matrices: T factored matrices of one shape.

    Examples:
        >>> factored_gram([Factored(torch.eye(6)[:, :1], torch.eye(4)[:1], scale) for scale in (1.0, -2.0)]).tolist()
        [[1.0, -2.0], [-2.0, 4.0]]
    """
    wide = [(matrix.scale * matrix.left.double(), matrix.right.double()) for matrix in matrices]
    rows = [[((B.mT @ other_B) * (A @ other_A.mT)).sum() for other_B, other_A in wide] for B, A in wide]
    return torch.stack([torch.stack(row) for row in rows])


@dataclass(frozen=True, repr=False)
class Triplets:
    """Leading singular triplets of a product, float64.

    Unpacks as ``U, S, Vh = leading_triplets(matrix, k)``.

    Attributes:
        U: (m, k) orthonormal columns.
        S: (k,) singular values, falling.
        Vh: (k, n) orthonormal rows.
        captured_energy: share of the squared Frobenius norm that they hold.
        cut: the accuracy of the subspaces.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor
    captured_energy: float
    cut: Cut

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.U, self.S, self.Vh))

    def __repr__(self) -> str:
        return f"Triplets({len(self.U)}x{self.Vh.shape[1]}, rank {len(self.S)}, {self.certificate.verdict})"

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
    """Compute the leading singular triplets of a product.

    Takes two thin QRs and the SVD of a core of the inner dimension; the product is never formed. Rows and columns of
    zeros stay zero to the bit. Singular values count as zero if rounding of the sum over the inner dimension can make
    them.

    Args:
        matrix: (m, n).
        rank: >= 0, or a function of the singular values, padded with zeros to min(m, n). The numerical rank limits it.

    Returns:
        U, S and Vh, float64.

    Raises:
        DTypeError: the matrix is not factored.
        NonFiniteError: a factor holds NaN or infinity, or the product overflows float64.
        ConvergenceError: the SVD failed.

    Examples:
        >>> U, S, Vh = leading_triplets(Factored(torch.eye(6)[:, :2], torch.eye(4)[:2], 3.0), 1)
        >>> S
        tensor([3.], dtype=torch.float64)
    """
    check_factored([matrix], "leading_triplets")
    (rank,) = given_ranks(rank, 1, "leading_triplets")
    if not all(bool(torch.isfinite(factor).all()) for factor in (matrix.left, matrix.right)):
        raise NonFiniteError(f"a factor of a {matrix.shape} matrix holds NaN or infinity: it has no singular values")
    # Scale the factors, so that only the product itself may overflow or underflow.
    (left, of_left), (right, of_right) = near_one(matrix.left), near_one(matrix.right)
    scale, of_scale = math.frexp(matrix.scale)
    Q_left, R_left = thin_qr(left)
    Q_right, R_right = thin_qr(right.mT)
    P, values, Qh = svd(R_left @ R_right.mT * scale)
    padded = torch.cat([values, values.new_zeros(max(0, min(matrix.shape) - len(values)))])
    # The summands may be larger than the sum.
    summed = torch.linalg.vector_norm(left, dim=0) @ torch.linalg.vector_norm(right, dim=1)
    noise = BACKWARD_ERROR * abs(scale) * float(summed)
    norm = float(torch.linalg.vector_norm(values))
    smallest = max(2.0**-46 * norm, noise)

    def clipped(shift: float) -> int:
        shifted = (padded + shift).clamp(min=0)
        wanted = rank if isinstance(rank, int) else whole_number(rank(shifted), "what a rank rule returns")
        return min(wanted, int((shifted > smallest).sum()))

    ranks = [clipped(shift) for shift in (0.0, noise, -noise)] if norm else [0]  # a rule is not called with zeros only
    k, edge = ranks[0], len(set(ranks)) > 1
    largest = float(values[0]) if len(values) else 0.0
    share = noise / largest if largest else 0.0
    energy = float(values[:k].square().sum()) / norm**2 if norm else 1.0
    padded = finite(_times_power(padded, of_left + of_right + of_scale), "leading_triplets")
    cut = Cut(padded, k, spread=share, inherent=share, edge=edge)
    return Triplets(Q_left @ P[:, :k], padded[:k], Qh[:k] @ Q_right.mT, min(1.0, energy), cut)


def _times_power(x: Tensor, power: int) -> Tensor:
    """Return ``2^power x`` without intermediate overflow or underflow."""
    power = min(max(power, -2000), 2000)
    half = power // 2
    return x * 2.0**half * 2.0 ** (power - half)
