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

from .. import orthonormal
from ..on_device import gaussian
from .cuda_graph import replayed
from .number_formats import Arithmetic, Operand, Precision, arithmetic, padded
from .polar_express import polar_of_operand
from .purification import batches, largest_ritz_value
from .subspaces import ProductsSubspaces, accurate_subspaces, smallest_singular_value, solve_gram
from .turning import interpret, measure, weakest

# Concatenated bases of fine-tunes at k = r // T reach condition numbers of 1e4. Smaller singular values are not
# resolved.
LOWER = 2.0**-17

# Roots of eps down to which the Gram matrix of the bases resolves their singular values well enough for a lower bound.
RESOLVED = 8

# Inverse iteration overestimates the smallest singular value of bases, hardly ever by that much.
ESTIMATED = 1.25

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
    merges: list[ProductsMerge] = []
    for group in batches(
        [(core.matrix.shape[0], layer[0].core.shape[0]) for core, layer in zip(cores, of_layers, strict=True)]
    ):
        merges += _merge(of_layers[group], cores[group], precision, keep_factors)
    return merges


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

    @classmethod
    def of(cls, parts: Sequence[ProductsSubspaces], weights: Sequence[float]) -> _Core:
        core = torch.block_diag(*(w * part.core for w, part in zip(weights, parts, strict=True)))  # type: ignore[no-untyped-call]
        unit = core.abs().amax().clamp(min=torch.finfo(core.dtype).tiny)
        matrix = core / unit
        largest = max(abs(w) * part.ratio * part.smallest for w, part in zip(weights, parts, strict=True)) / unit
        dominance = LARGEST * largest / torch.linalg.vector_norm(matrix)
        return cls(matrix, unit, dominance.nan_to_num(1.0).clamp(max=1.0))


def _merge(
    layers: list[list[ProductsSubspaces]], cores: list[_Core], precision: Precision, keep_factors: bool
) -> list[ProductsMerge]:
    """Multiply the polar factors of the bases of some layers with the weighted cores.

    All of them have the same width, and their first tasks one rank.
    """
    numbers, L = arithmetic(precision), len(layers)
    lefts = torch.stack([torch.cat([part.U for part in layer], 1) for layer in layers])
    rights = torch.stack([torch.cat([part.Vh for part in layer], 0) for layer in layers]).mT
    k, bound = lefts.shape[-1], len(layers[0]) ** 0.5
    loaded = [numbers.load(padded(stack, k), bounded=True) for stack in (lefts, rights)]
    grams = [numbers.gram(X) for X in loaded]
    # A Gram matrix resolves singular values down to a few roots of eps.
    resolved = RESOLVED * numbers.eps**0.5 * bound
    smallest, largest = extremes_of_bases(grams, k, layers[0][0].core.shape[0], numbers)
    seen = [value if value > resolved else 0.0 for value in smallest.tolist()]
    factors = [
        polar_of_operand(X, k, bound, lower_bound(min(own)) / bound, precision, gram=gram)
        for X, own, gram in zip(loaded, (seen[:L], seen[L:]), grams, strict=True)
    ]
    H = torch.cat(
        [
            numbers.dense(numbers.multiply(X.mT, numbers.load(padded(polar.matrix, k), bounded=True)))[..., :k, :k]
            for X, polar in zip(loaded, factors, strict=True)
        ]
    ).double()
    roots = cholesky((H + H.mT) / 2, numbers)  # of (X^T X)^(1/2)
    Z = weakest(partial(_inverse, roots), 2 * L, k, lefts.device)
    matrices = torch.stack([core.matrix for core in cores])
    table = torch.cat(
        [
            torch.stack([largest, torch.stack([core.dominance for core in cores]).repeat(2)], 1),
            torch.cat(
                [
                    measure(lefts, factors[0].matrix.double(), partial(solve_gram, roots[:L]), Z[:L], matrices,
                            _of_blocks([[part.left_inside for part in layer] for layer in layers]),
                            _beside([[part.left_beyond for part in layer] for layer in layers])),
                    measure(rights, factors[1].matrix.double(), partial(solve_gram, roots[L:]), Z[L:], matrices.mT,
                            _of_blocks([[part.inside for part in layer] for layer in layers]),
                            _beside([[part.right_beyond for part in layer] for layer in layers])),
                ]
            ),
        ],
        1,
    ).tolist()  # fmt: skip
    steps = max(polar.steps for polar in factors)
    merged = numbers.dense(
        numbers.multiply(
            numbers.multiply(numbers.load(factors[0].matrix, bounded=True), numbers.load(matrices, bounded=True)),
            numbers.load(factors[1].matrix, bounded=True).mT,
        )
    )
    results = []
    for i, (layer, core) in enumerate(zip(layers, cores, strict=True)):
        turnings, conditions = [], []
        for high, dominance, *rest in (table[i], table[L + i]):
            turnings.append(interpret(rest, k, [part.inside.shape[1] for part in layer], dominance))
            conditions.append(high / turnings[-1].smallest if turnings[-1].smallest > 0 else math.inf)
        of_subspaces = [
            sensitivity * part.subspace_error
            for turning in turnings
            for part, sensitivity in zip(layer, turning.sensitivity, strict=True)
        ]
        error = math.hypot(*of_subspaces) + sum(turning.turned + turning.defect for turning in turnings)
        left, right = (polar.matrix[i] for polar in factors)
        results.append(
            ProductsMerge(
                (merged[i].double() * core.unit).to(merged.dtype),
                tuple(layer),
                error + 8 * numbers.eps,
                max(turning.defect for turning in turnings),
                (conditions[0], conditions[1]),
                steps,
                (left.double(), core.matrix @ right.double().mT * core.unit) if keep_factors else None,
            )
        )
    return results


def _of_blocks(columns: list[list[Tensor]]) -> Tensor:
    """Return the columns of all tasks of each layer in the coordinates of all tasks (layers, k, all columns)."""
    return torch.stack([torch.block_diag(*layer) for layer in columns])  # type: ignore[no-untyped-call]


def _beside(columns: list[list[Tensor]]) -> Tensor:
    """Return the columns of all tasks of each layer side by side."""
    return torch.stack([torch.cat(layer, 1) for layer in columns])


def _inverse(R: Tensor, z: Tensor) -> Tensor:
    """Return ``(X^T X)^-1 z`` from the Cholesky factor of the root of ``X^T X``."""
    return solve_gram(R, solve_gram(R, z))


def cholesky(H: Tensor, numbers: Arithmetic) -> Tensor:
    """Return the upper triangular R (..., k, k) with ``R^T R = H``, float64; something else if H is not definite.

    Large matrices are taken in two blocks: what the first one explains of the second comes from a product in the format
    of `numbers`. It is as accurate as H if that is such a product, too.
    """
    if H.shape[-1] < orthonormal.BLOCKED_FROM:
        whole: Tensor = torch.linalg.cholesky_ex(H, upper=True).L
        return whole
    half = H.shape[-1] // 2
    first = torch.linalg.cholesky_ex(H[..., :half, :half], upper=True).L
    beside = torch.linalg.solve_triangular(first.mT, H[..., :half, half:], upper=False)
    explained = numbers.dense(numbers.gram(numbers.load(beside)))
    R = torch.zeros_like(H)
    R[..., :half, :half] = first
    R[..., :half, half:] = beside
    R[..., half:, half:] = torch.linalg.cholesky_ex(H[..., half:, half:] - explained, upper=True).L
    return R


def extremes_of_bases(grams: Sequence[Operand], k: int, first: int, numbers: Arithmetic) -> tuple[Tensor, Tensor]:
    """Estimate the smallest (from above) and largest (from below) singular value of bases side by side.

    The first basis is orthonormal. With ``C = X_1^T X_2``, the others have the Schur complement ``X_2^T X_2 - C^T C``:
    two thirds as large for three tasks. Where v is its last singular vector, ``(-C v, v)`` is nearly that of X.

    Args:
        grams: ``X^T X``, operands of (L, k, k) or more, filled up.
        k: columns of X.
        first: those of the first basis.
        numbers: format of the operands.

    Returns:
        One number for each matrix of each operand, float64. The smallest is 0 where rounding hides it.
    """
    whole = torch.cat([numbers.dense(gram) for gram in grams])
    start = gaussian(whole.shape[-1], 4, whole.device).to(whole.dtype).repeat(len(whole), 1, 1)
    largest = replayed(largest_ritz_value, whole, start, 8).double().sqrt()
    if first == k:
        return torch.ones_like(largest), largest
    beside = whole[:, :first, first:k]
    inside = numbers.dense(numbers.gram(numbers.load(padded(beside, k - first), bounded=True)))
    complement = (whole[:, first:k, first:k] - inside[:, : k - first, : k - first]).double()
    factors, failed = torch.linalg.cholesky_ex(complement, upper=True)
    smallest, v = smallest_singular_value(factors)
    lengths = torch.linalg.vector_norm(beside.double() @ v, dim=-2).amax(-1)
    return torch.where(failed > 0, 0.0, (smallest / (1 + lengths.square()).sqrt()).nan_to_num(0.0)), largest


def lower_bound(smallest: float) -> float:
    """Return a number somewhat below the smallest singular value of a batch of bases, but not less than `LOWER`.

    A polar factor takes one step for each factor of 4, and every step adds rounding errors: well-conditioned bases need
    4 steps instead of 10 and have a sixth of the error. It is a power of two, so that few polynomials and CUDA graphs
    serve all bases.
    """
    return max(2.0 ** math.floor(math.log2(smallest / ESTIMATED)), LOWER) if smallest > LOWER else LOWER
