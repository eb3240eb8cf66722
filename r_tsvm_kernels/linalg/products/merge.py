"""TSV-Merge of a batch of layers from matrix products alone, with the measurements for a certificate.

Subspaces of all tasks, polar factors of the concatenated bases, weighted cores between them; see `products`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .gram_polar import ends_of_gram
from .number_formats import Precision, arithmetic, padded
from .polar_express import polar_express
from .subspaces import ProductsSubspaces, accurate_subspaces, extremes, unit_columns
from .turning import Turning, interpret, measure, solve_gram

# Concatenated bases of fine-tunes at k = r // T reach condition numbers of 1e4. Smaller singular values are not
# resolved.
LOWER = 2.0**-17

# Roots of eps down to which the Gram matrix of the bases resolves their singular values well enough for a lower bound.
RESOLVED = 8

# Power iteration underestimates the largest singular value of a core.
LARGEST = 1.2


@dataclass(frozen=True)
class ProductsMerge:
    """The merged update with its measurements.

    Attributes:
        matrix: (m, n) float32, or float64 if that was the precision.
        parts: the subspaces of each task.
        error: estimated relative error (Frobenius norm); NaN or large if the bases have no full rank.
        orthogonality: relative defect of the two polar factors, measured on random vectors and on the weighted cores.
            A basis with singular values below `LOWER` shows here.
        condition: of the left and the right bases, estimated from below.
        polar_steps: quintic steps, the larger number of both polar factors.
        factors: ``polar(U)`` (m, k), and the weighted cores times ``polar(V)^T`` (k, n), in float64, if asked for.
    """

    matrix: Tensor
    parts: tuple[ProductsSubspaces, ...]
    error: float
    orthogonality: float
    condition: tuple[float, float]
    polar_steps: int
    factors: tuple[Tensor, Tensor] | None = None


def products_tsv_merge(
    matrices: Tensor,
    ranks: Sequence[int],
    weights: Sequence[float] | None = None,
    precision: Precision = "fp16x3",
    tolerance: float | None = None,
) -> ProductsMerge:
    """Merge the task matrices (T, m, n) of one layer, see `products_tsv_merges`."""
    return products_tsv_merges(matrices[None], [ranks], None if weights is None else [weights], precision, tolerance)[0]


def products_tsv_merges(
    layers: Tensor,
    ranks: Sequence[Sequence[int]],
    weights: Sequence[Sequence[float]] | None = None,
    precision: Precision = "fp16x3",
    tolerance: float | None = None,
    *,
    keep_factors: bool = False,
) -> list[ProductsMerge]:
    """TSV-Merge (see `tsv_merge`) of the same-shape task matrices of several layers, from matrix products alone.

    All matrices of all layers are solved in one batch. The concatenated bases must have full rank: the caller leaves
    out rows and columns that are zero in all tasks, and takes another solver if `error` is too large.

    Args:
        layers: (L, T, m, n) float32 or float64, finite.
        ranks: T ranks for each layer, of sum at most min(m, n), none above the numerical rank.
        weights: T factors of the cores for each layer; None means 1.
        precision: as for `products_subspaces`.
        tolerance: as for `accurate_subspaces`.
        keep_factors: return the factors of the merged matrix, too.
    """
    tasks, flat_ranks = layers.shape[1], [rank for layer in ranks for rank in layer]
    parts = accurate_subspaces(layers.flatten(0, 1), flat_ranks, precision, tolerance)
    of_layers = [parts[first : first + tasks] for first in range(0, len(parts), tasks)]
    cores = [_Core.of(layer, [1.0] * tasks if weights is None else weights[i]) for i, layer in enumerate(of_layers)]
    lefts = _orthogonalize(
        [torch.cat([part.U for part in layer], 1) for layer in of_layers],
        cores,
        False,
        [[(unit_columns(part.core @ part.inside), part.left_beyond) for part in layer] for layer in of_layers],
        precision,
    )
    rights = _orthogonalize(
        [torch.cat([part.Vh for part in layer], 0).mT for layer in of_layers],
        cores,
        True,
        [[(part.inside, part.right_beyond) for part in layer] for layer in of_layers],
        precision,
    )
    return [_multiply(*layer, precision, keep_factors) for layer in zip(of_layers, cores, lefts, rights, strict=True)]


@dataclass(frozen=True)
class _Core:
    """The weighted cores of a layer, ``blockdiag(w_t core_t)``.

    Attributes:
        matrix: (k, k) float64, over `unit`.
        unit: its largest entry.
        dominance: estimate of its largest singular value over its Frobenius norm, rather too large.
    """

    matrix: Tensor
    unit: Tensor
    dominance: Tensor

    def of_side(self, transposed: bool) -> Tensor:
        """Return the factor of the left polar factor, or of the right one."""
        return self.matrix.mT if transposed else self.matrix

    @classmethod
    def of(cls, parts: Sequence[ProductsSubspaces], weights: Sequence[float]) -> _Core:
        core = torch.block_diag(*(w * part.core for w, part in zip(weights, parts, strict=True)))  # type: ignore[no-untyped-call]
        unit = core.abs().amax().clamp(min=torch.finfo(core.dtype).tiny)
        matrix = core / unit
        largest = max(abs(w) * part.ratio * part.smallest for w, part in zip(weights, parts, strict=True)) / unit
        dominance = LARGEST * largest / torch.linalg.vector_norm(matrix)
        return cls(matrix, unit, dominance.nan_to_num(1.0).clamp(max=1.0))


@dataclass(frozen=True)
class _Side:
    """The polar factor of a concatenated basis with its measurements.

    Attributes:
        matrix: (m, k) the polar factor.
        steps: quintic steps.
        turning: its distance from the exact one.
        condition: of the basis.
    """

    matrix: Tensor
    steps: int
    turning: Turning
    condition: float


def _orthogonalize(
    bases: list[Tensor],
    cores: list[_Core],
    transposed: bool,
    directions: list[list[tuple[Tensor, Tensor]]],
    precision: Precision,
) -> list[_Side]:
    """Return the polar factors of concatenated bases, in one batch if their widths allow.

    Args:
        bases: for each layer (m, k), float64.
        cores: of each layer, the factors of the polar factors.
        transposed: whether these are the right ones.
        directions: for each layer and task the directions of the basis (k_t, any number) that are most likely wrong,
            and those towards which they may be turned (m, any number).
        precision: format of the products.
    """
    if len({basis.shape for basis in bases}) > 1:
        apart = zip(bases, cores, directions, strict=True)
        return [_orthogonalize([X], [core], transposed, [own], precision)[0] for X, core, own in apart]
    stack, numbers = torch.stack(bases), arithmetic(precision)
    X = numbers.load(padded(stack, stack.shape[-1]))
    k, bound = stack.shape[-1], len(directions[0]) ** 0.5
    smallest, _ = ends_of_gram(numbers.dense(numbers.gram(X))[..., :k, :k])
    # A Gram matrix resolves singular values down to a few roots of eps.
    seen = [value if value > RESOLVED * numbers.eps**0.5 * bound else 0.0 for value in smallest.tolist()]
    batch = polar_express(stack, bound, lower_bound(min(seen)) / bound, precision)
    H = numbers.dense(numbers.multiply(X.mT, numbers.load(padded(batch.matrix, k))))[..., :k, :k].double()
    factors = torch.linalg.cholesky_ex((H + H.mT) / 2, upper=True).L  # of (X^T X)^(1/2)
    table = torch.stack(
        [
            torch.cat(
                [
                    torch.stack([*extremes(R)[:2], core.dominance]),
                    measure(X, Q.double(), partial(_inverse, R), core.of_side(transposed), own),
                ]
            )
            for X, Q, R, core, own in zip(stack, batch.matrix, factors, cores, directions, strict=True)
        ]
    ).tolist()
    sides = []
    for Q, (largest, smallest, dominance, *rest), own in zip(batch.matrix, table, directions, strict=True):
        turning = interpret(rest, k, [a.shape[1] for a, _ in own], dominance)
        condition = (largest / smallest) ** 2 if smallest > 0 else math.inf
        sides.append(_Side(Q, batch.steps, turning, condition))
    return sides


def _inverse(R: Tensor, z: Tensor) -> Tensor:
    """Return ``(X^T X)^-1 z`` from the Cholesky factor of the root of ``X^T X``."""
    return solve_gram(R, solve_gram(R, z))


def lower_bound(smallest: float) -> float:
    """Return half of the smallest singular value of a batch of bases, or less, but not less than `LOWER`.

    A polar factor takes one step for each factor of 4, and every step adds rounding errors: well-conditioned bases need
    4 steps instead of 10 and have a sixth of the error. It is a power of two, so that few polynomials and CUDA graphs
    serve all bases.
    """
    return max(2.0 ** math.floor(math.log2(smallest / 2)), LOWER) if smallest > LOWER else LOWER


def _multiply(
    parts: list[ProductsSubspaces], core: _Core, left: _Side, right: _Side, precision: Precision, keep_factors: bool
) -> ProductsMerge:
    """Multiply the polar factors with the weighted cores between them."""
    numbers = arithmetic(precision)
    inner = numbers.multiply(numbers.load(left.matrix), numbers.load(core.matrix))
    merged = numbers.dense(numbers.multiply(inner, numbers.load(right.matrix).mT))
    factors = (left.matrix.double(), core.matrix @ right.matrix.double().mT * core.unit) if keep_factors else None
    turnings = (left.turning, right.turning)
    subspaces = [
        sensitivity * part.subspace_error
        for turning in turnings
        for part, sensitivity in zip(parts, turning.sensitivity, strict=True)
    ]
    error = math.hypot(*subspaces) + sum(turning.turned + turning.defect for turning in turnings) + 8 * numbers.eps
    return ProductsMerge(
        (merged.double() * core.unit).to(merged.dtype),
        tuple(parts),
        error,
        max(turning.defect for turning in turnings),
        (left.condition, right.condition),
        max(left.steps, right.steps),
        factors,
    )
