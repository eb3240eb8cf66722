"""The accuracy of a TSV-Merge, from the errors of the subspaces, the polar factors and the cores between them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..errors import ConvergenceError, NonFiniteError
from .certificate import CANCELLED, Certificate
from .decompositions import frobenius_norm
from .interference import interference_of_gram
from .inverse_root import PROBES, InverseRoot, root_of_factor, root_of_gram
from .on_device import gaussian
from .parallel import run_concurrently
from .rounding import BACKWARD_ERROR, Cut
from .tall_matrix import add_gram

# Largest number of columns of the bases for which the cost of the SVD of a triangular factor is negligible.
SMALL = 256


@dataclass(frozen=True)
class Side:
    """The inverse root for one of the two polar factors.

    Attributes:
        root: of ``X^T X``.
        defect: relative error of the polar factor, measured on random vectors and on weighted cores.
        factors: whose product is ``X^T X``.
    """

    root: InverseRoot
    defect: float
    factors: tuple[Tensor, ...]

    @classmethod
    def measured(cls, root: InverseRoot, probes: Tensor, factors: tuple[Tensor, ...]) -> Side:
        """Measure the defect."""
        return cls(root, root.defect(*factors, probes=probes), factors)

    @property
    def full(self) -> bool:
        """Whether the basis has full column rank."""
        return self.root.rank == self.factors[-1].shape[1]


class WeightedCores:
    """The weighted cores of all tasks, ``C = blockdiag(w_t R_t)``.

    Attributes:
        unit: a power of two near the largest Frobenius norm of one of them; 1 if all are zero.
        blocks: T matrices (k_t, k_t), over `unit`; of a diagonal matrix its diagonal (k_t,).
        dominance: bound of the largest singular value of C, as a share of its Frobenius norm: the largest effect of an
            error of a single direction of the polar factors on the merged matrix.
    """

    def __init__(self, cores: Sequence[Tensor], weights: Sequence[float]) -> None:
        norms = [abs(w) * frobenius_norm(core) for w, core in zip(weights, cores, strict=True)]
        if not all(map(math.isfinite, norms)):
            raise NonFiniteError("weights times singular values overflow float64; check the scale of the weights")
        self.unit = 2.0 ** min(max(math.frexp(max(norms, default=0.0) or 1.0)[1], -1000), 1000)
        self.blocks = [core * (weight / self.unit) for weight, core in zip(weights, cores, strict=True)]
        total = math.hypot(*(norm / self.unit for norm in norms))
        self.dominance = max(map(_largest, self.blocks), default=0.0) / total if total else 1.0

    def times(self, z: Tensor, transposed: bool = False) -> Tensor:
        """Return ``C z``, or ``C^T z``, over `unit`, in the dtype of z."""
        product, first = torch.empty_like(z), 0
        for block in self.blocks:
            rows, C = slice(first, first + len(block)), block.to(z.dtype)
            if C.dim() == 1:
                torch.mul(C[:, None], z[rows], out=product[rows])
            else:
                torch.mm(C.mT if transposed else C, z[rows], out=product[rows])
            first = rows.stop
        return product

    def norm_between(self, left: Side, right: Side) -> float:
        """Return the norm of the merged matrix as a share of the norm of C, at least `CANCELLED`."""
        if left.full and right.full:  # polar factors of full rank keep norms
            return 1.0
        size = sum(len(core) for core in self.blocks)
        whole = self.times(torch.eye(size, dtype=self.blocks[0].dtype, device=self.blocks[0].device))
        seen = right.root.projected(*right.factors, z=whole.mT)  # (C P_V)^T with the projector P_V
        merged = left.root.projected(*left.factors, z=seen.mT)
        norm = float(torch.linalg.vector_norm(whole))
        return max(float(torch.linalg.vector_norm(merged)) / norm, CANCELLED) if norm else 1.0


def merge_certificate(
    cuts: Sequence[Cut],
    left: Side,
    right: Side,
    cores: WeightedCores,
    *,
    shrunk: float,
    tolerance: float,
    route: str,
    rounding: float,
    exact: bool,
    escalations: tuple[str, ...] = (),
) -> Certificate:
    """Estimate the error of a merged matrix, relative to its norm.

    To first order an error e of a column x of the basis X moves the polar factor by at most ``2 e |(X^T X)^(-1/2) x|``
    (of unit vectors x), and the merged matrix by that times the largest singular value of the cores.

    Args:
        cuts: of the T tasks.
        left: polar factor of the left bases.
        right: of the right bases.
        cores: between them.
        shrunk: norm of the merged matrix as a share of that of the cores.
        tolerance: see `Certificate`.
        route: see `Certificate`.
        rounding: relative error of the last products and of the output's dtype.
        exact: whether no other route is more accurate: an uncertain choice of directions is then arbitrary.
        escalations: see `Certificate`.
    """
    fixed = left.defect + right.defect + left.root.rounding + right.root.rounding
    ranks = [cut.rank for cut in cuts]
    sides = [(torch.split(side.root.sensitivity, ranks), side is left) for side in (left, right)]

    def total(allowed: float = 0.0) -> tuple[float, float, bool]:
        """Return the error, that of the subspaces alone, and whether there was an arbitrary choice."""
        plain = [cut.error(allowed, left=True)[0] for cut in cuts]
        weighted = [
            cut.error(allowed, weights=weights, left=is_left)
            for sensitivity, is_left in sides
            for cut, weights in zip(cuts, sensitivity, strict=True)
        ]
        # A singular value of the bases may be on either side of the threshold for their rank.
        edge = math.hypot(*plain) + BACKWARD_ERROR >= min(left.root.margin, right.root.margin)
        if edge and not (exact and allowed):
            return math.inf, max(plain), False
        error = (fixed + cores.dominance * math.hypot(*(error for error, _ in weighted))) / shrunk + rounding
        return error, max(plain), edge or any(arbitrary for _, arbitrary in weighted)

    error, subspace_error, arbitrary = total()
    if not error <= tolerance:
        settled = total(allowed=tolerance * shrunk / cores.dominance / (8 * len(cuts)) ** 0.5)
        if settled[0] <= tolerance:
            error, subspace_error, arbitrary = settled
    return Certificate(
        error=error,
        orthogonality=max(left.defect, right.defect),
        subspace_error=subspace_error,
        tolerance=tolerance,
        route=route,
        basis_rank=(left.root.rank, right.root.rank),
        basis_condition=(left.root.condition, right.root.condition),
        gap=min(cut.gap for cut in cuts),
        arbitrary=arbitrary,
        escalations=escalations,
    )


def _largest(core: Tensor) -> float:
    """Return the largest singular value of a diagonal matrix, given its diagonal, or a bound of a nearly diagonal's."""
    sizes = core.abs()
    if not core.numel():
        return 0.0
    return float(sizes.amax() if core.dim() == 1 else (sizes.sum(1).amax() * sizes.sum(0).amax()).sqrt())


@dataclass(frozen=True)
class PolarPair:
    """The polar factors of two concatenated bases, and how accurate a merge between them is.

    Attributes:
        left: (m, k) float64.
        right: (n, k) float64.
        certificate: of ``left @ C @ right^T`` with the weighted cores C.
        interference: of the left and the right bases.
    """

    left: Tensor
    right: Tensor
    certificate: Certificate
    interference: tuple[float, float]


def polar_pair(
    lefts: Sequence[Tensor],
    rights: Sequence[Tensor],
    cuts: Sequence[Cut],
    cores: WeightedCores,
    *,
    tolerance: float,
    route: str,
    rounding: float,
    exact: bool,
    escalations: tuple[str, ...] = (),
) -> PolarPair:
    """Concatenate orthonormal bases and take their polar factors.

    Args:
        lefts: T matrices (m, k_t), float64.
        rights: T matrices (n, k_t), float64.
        cuts: how accurate each of them is.
        cores: the weighted cores between left and right.
        tolerance: as for `merge_certificate`.
        route: as for `merge_certificate`.
        rounding: as for `merge_certificate`.
        exact: as for `merge_certificate`.
        escalations: as for `merge_certificate`.

    Raises:
        ConvergenceError: the tolerance is missed, or a decomposition failed.
    """
    ranks = [basis.shape[1] for basis in lefts]
    bases = torch.cat(list(lefts), dim=1), torch.cat(list(rights), dim=1)
    z = gaussian(sum(ranks), PROBES, bases[0].device)
    probes = cores.times(z), cores.times(z, transposed=True)
    solves = [partial(_whiten, *side, ranks) for side in zip(bases, probes, strict=True)]
    (left, overlap), (right, other) = run_concurrently(solves, sum(ranks), z.device)
    certificate = merge_certificate(
        cuts,
        left,
        right,
        cores,
        shrunk=cores.norm_between(left, right),
        tolerance=tolerance,
        route=route,
        rounding=rounding,
        exact=exact,
        escalations=escalations,
    )
    certificate.require()
    factors = left.root.matrix.after(bases[0]), right.root.matrix.after(bases[1])
    return PolarPair(*factors, certificate, (overlap, other))


def _whiten(basis: Tensor, probes: Tensor, ranks: Sequence[int]) -> tuple[Side, float]:
    """Return the inverse root of ``basis^T basis`` by the cheapest route, and the overlap of the tasks' bases."""
    gram = basis.new_empty(basis.shape[1], basis.shape[1])
    add_gram(gram, basis, fresh=True)
    overlap = interference_of_gram(gram, ranks)
    with suppress(ConvergenceError):
        if len(gram) > SMALL:
            return Side.measured(root_of_gram(gram), probes, (gram,)), overlap
    R = torch.linalg.qr(basis, mode="r").R
    return Side.measured(root_of_factor(R), probes, (R.mT, R)), overlap
