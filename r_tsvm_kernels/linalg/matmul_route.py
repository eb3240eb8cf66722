"""TSV-Merge from matrix products alone: the route for tensor cores, with the numbers a certificate needs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .arithmetic import Precision, arithmetic, padded
from .orthonormal import cholesky_qr, orthogonality
from .polar_express import Polar, polar_express
from .purification import compress, leading_eigenspaces
from .transfer import gaussian

# Concatenated bases of fine-tunes at k = r // T reach condition numbers of 1e4. Below this nothing is resolved.
LOWER = 2.0**-17

# What becomes of rounding errors, measured: see benchmarks/spectral_accuracy.py. The polar factors multiply those of
# the bases. Those of the Gram matrix count most where the boundary lies in a flat part of the spectrum.
POLAR_AMPLIFICATION, GRAM_AMPLIFICATION = 128, 8

# Invariance that rounding explains, in eps of the format. Twice the largest that was seen where all went well.
INVARIANCE_FLOOR = 16

# A singular value below the largest by more than this is float32 rounding: k lies above the numerical rank.
LARGEST_RATIO = 2.0**22

# Largest error estimate at which nothing is solved again, relative to the merged matrix.
TOLERANCE: dict[Precision, float] = {"float64": 1e-9, "float32": 5e-5, "fp16x3": 5e-5, "fp16": 5e-2}


@dataclass(frozen=True)
class MatmulSubspaces:
    """Leading singular subspaces ``D ~ U core Vh`` of one matrix and what was measured of them.

    Attributes:
        U: (m, k) float64, orthonormal columns.
        core: (k, k) float64.
        Vh: (k, n) float64, orthonormal rows.
        orthogonality: largest entry of ``|Q^T Q - I|`` over U and V.
        residual: ``norm(D V - U core) / norm(D)``: is the factorisation right?
        invariance: ``norm(D^T U - V core^T) / norm(D)``: are the subspaces singular ones? Together 0 only if so.
        rank_defect: distance of the projector's trace from k. Beyond 0.1 the boundary at k was not resolved.
        smallest: estimate of ``sigma_k``, rather above than below.
        ratio: estimate of ``sigma_1 / sigma_k``, rather below than above.
        error_estimate: of the merged matrix, ``eps (128 + 8 h^2)`` with eps of the format and h the ratio, or
            ``level / sigma_k`` if the spectrum was compressed; plus what `invariance` lacks beyond rounding, over
            ``sigma_k``. Infinite if the projector is none (`rank_defect`) or k above the numerical rank (`ratio`): the
            caller must go to another solver.
        outer_steps: squares of full size.
        inner_steps: squares of about 1.2 k.
        compressed: whether the spectrum was compressed in float64 first.
    """

    U: Tensor
    core: Tensor
    Vh: Tensor
    orthogonality: float
    residual: float
    invariance: float
    rank_defect: float
    smallest: float
    ratio: float
    error_estimate: float
    outer_steps: int
    inner_steps: int
    compressed: bool


@dataclass(frozen=True)
class MatmulMerge:
    """The merged update and what was measured on the way.

    Attributes:
        matrix: (m, n) float32, or float64 if that was the precision.
        parts: the subspaces of each task.
        orthogonality: largest entry of ``|Q^T Q - I|`` over the two polar factors. A basis with singular values below
            `LOWER` shows here.
        polar_steps: quintic steps, of the polar factor that took more.
    """

    matrix: Tensor
    parts: tuple[MatmulSubspaces, ...]
    orthogonality: float
    polar_steps: int


def matmul_subspaces(
    matrices: Tensor, ranks: Sequence[int], precision: Precision = "fp16x3", levels: Tensor | None = None
) -> list[MatmulSubspaces]:
    """Find leading singular subspaces of a batch of matrices by purification of their short-side Gram matrices.

    Args:
        matrices: (B, m, n) float32 or float64, finite.
        ranks: B ranks in 1..min(m, n), none above the numerical rank.
        precision: ``fp16x3`` (exact mode), ``fp16`` (fast mode), or ``float32``, ``float64``.
        levels: (B,) estimates of the k-th singular value, better too large than too small. With them the Gram matrix
            and ``D V`` are computed in float64 and the spectrum is compressed, see `purification.compress`: for large
            ``sigma_1 / sigma_k``.
    """
    if matrices.shape[-2] < matrices.shape[-1]:
        flipped = matmul_subspaces(matrices.mT, ranks, precision, levels)
        return [replace(part, U=part.Vh.mT, core=part.core.mT, Vh=part.U.mT) for part in flipped]
    numbers = arithmetic(precision)
    exact = matrices.double()
    # In units of a power of two near the largest entry, so that no square overflows.
    unit = torch.frexp(exact.abs().amax((-2, -1)).clamp(min=2.0**-1000)).exponent
    unit = torch.ldexp(torch.ones_like(exact[:, 0, 0]), unit)
    exact = exact / unit[:, None, None]
    if levels is None:
        spaces = leading_eigenspaces(numbers.dense(numbers.gram(numbers.load(exact))), ranks, precision)
    else:
        gram = compress(exact.mT @ exact, (levels.double() / unit).square())
        spaces = leading_eigenspaces(gram, ranks, precision, largest=torch.ones_like(unit))
    found, measured = [], []
    for index, V in enumerate(spaces.bases):
        D = exact[index]
        if levels is None:
            image = numbers.dense(numbers.multiply(numbers.load(D), numbers.load(padded(V, ranks[index]))))
            image = image[:, : ranks[index]]
        else:
            image = D @ V
        U, R = cholesky_qr(image)
        found.append((U, R * unit[index], V))
        skew = torch.maximum(orthogonality(U), orthogonality(V))
        measured.append(torch.stack([skew, *_residuals(D, U, R, V), *_extremes(R)]))
    rest = (spaces.rank_defect, spaces.outer_steps, spaces.inner_steps, unit, unit if levels is None else levels)
    table = torch.cat([torch.stack(measured), torch.stack([x.double() for x in rest], 1)], 1)
    return [
        _part(bases, row, numbers.eps, levels is not None)
        for bases, row in zip(found, table.tolist(), strict=True)  # here the host waits for the first time
    ]


def _part(bases: tuple[Tensor, Tensor, Tensor], measured: list[float], eps: float, compressed: bool) -> MatmulSubspaces:
    """Put U, core and V of one matrix together with what was measured of them."""
    skew, norm, residual, invariance, largest, smallest, rank_defect, outer_steps, inner_steps, unit, level = measured
    norm = max(norm, torch.finfo(torch.float64).tiny)
    ratio = largest / smallest if smallest > 0 else float("inf")
    usable = ratio < LARGEST_RATIO and rank_defect < 0.1
    height = level / (smallest * unit) if compressed and usable else ratio
    estimate = eps * (POLAR_AMPLIFICATION + GRAM_AMPLIFICATION * height**2)
    # What rounding does not explain: the first level stopped too early, and the second one cannot know.
    estimate += (
        max(invariance / norm - INVARIANCE_FLOOR * eps, 0.0) * norm / max(smallest, torch.finfo(torch.float64).tiny)
    )
    return MatmulSubspaces(
        bases[0],
        bases[1],
        bases[2].mT,
        orthogonality=skew,
        residual=residual / norm,
        invariance=invariance / norm,
        rank_defect=rank_defect,
        smallest=smallest * unit,
        ratio=ratio,
        error_estimate=estimate if usable else float("inf"),
        outer_steps=int(outer_steps),
        inner_steps=int(inner_steps),
        compressed=compressed,
    )


def _residuals(D: Tensor, U: Tensor, R: Tensor, V: Tensor) -> tuple[Tensor, ...]:
    """Return the norms of D, of what is missing to ``D V = U R``, and to ``D^T U = V R^T``."""
    return tuple(torch.linalg.vector_norm(x) for x in (D, D @ V - U @ R, D.mT @ U - V @ R.mT))


def matmul_tsv_merge(
    matrices: Tensor,
    ranks: Sequence[int],
    weights: Sequence[float] | None = None,
    precision: Precision = "fp16x3",
    tolerance: float | None = None,
) -> MatmulMerge:
    """Merge the task matrices (T, m, n) of one layer, see `matmul_tsv_merges`."""
    return matmul_tsv_merges(matrices[None], [ranks], None if weights is None else [weights], precision, tolerance)[0]


def matmul_tsv_merges(
    layers: Tensor,
    ranks: Sequence[Sequence[int]],
    weights: Sequence[Sequence[float]] | None = None,
    precision: Precision = "fp16x3",
    tolerance: float | None = None,
) -> list[MatmulMerge]:
    """TSV-Merge (see `tsv_merge`) of the same-shape task matrices of several layers, from matrix products alone.

    All matrices of all layers are solved in one batch. Those whose `error_estimate` is above `tolerance` are solved
    again with a compressed spectrum. The concatenated bases must have full rank: the caller leaves out rows and columns
    that no task touched, and goes to another solver if `orthogonality` says that the polar factor is not one.

    Args:
        layers: (L, T, m, n) float32 or float64, finite.
        ranks: T ranks for each layer, of sum at most min(m, n), none above the numerical rank.
        weights: T factors of the cores for each layer; None means 1.
        precision: as for `matmul_subspaces`.
        tolerance: largest error estimate that is accepted; infinity to compress nothing, 0 to compress always, None
            for `TOLERANCE`.
    """
    limit = TOLERANCE[precision] if tolerance is None else tolerance
    tasks = layers.shape[1]
    matrices, flat_ranks = layers.flatten(0, 1), [rank for layer in ranks for rank in layer]
    parts = matmul_subspaces(matrices, flat_ranks, precision)
    again = [i for i, part in enumerate(parts) if part.error_estimate > limit and part.ratio < LARGEST_RATIO]
    if again:
        levels = torch.tensor([parts[i].smallest for i in again], dtype=torch.float64, device=layers.device)
        solved = matmul_subspaces(matrices[again], [flat_ranks[i] for i in again], precision, levels)
        for i, part in zip(again, solved, strict=True):
            parts[i] = part
    of_layers = [parts[first : first + tasks] for first in range(0, len(parts), tasks)]
    lefts = _polar_factors([torch.cat([part.U for part in layer], 1) for layer in of_layers], tasks, precision)
    rights = _polar_factors([torch.cat([part.Vh for part in layer], 0).mT for layer in of_layers], tasks, precision)
    factors = [[1.0] * tasks] * len(of_layers) if weights is None else weights
    return [
        _reconstructed(layer, of_layer, left, right, precision)
        for layer, of_layer, left, right in zip(of_layers, factors, lefts, rights, strict=True)
    ]


def _polar_factors(bases: list[Tensor], tasks: int, precision: Precision) -> list[Polar]:
    """Return the polar factors of concatenated bases, in one batch if their widths allow."""
    bound = tasks**0.5
    if len({basis.shape for basis in bases}) > 1:
        return [_polar_factors([basis], tasks, precision)[0] for basis in bases]
    stack = torch.stack(bases)
    batch = polar_express(stack, bound, _smallest(stack) / bound, precision)
    return [
        Polar(matrix, orthogonality, batch.steps)
        for matrix, orthogonality in zip(batch.matrix, batch.orthogonality, strict=True)
    ]


def _smallest(bases: Tensor) -> float:
    """Return half of the smallest singular value of a batch of bases, or less, but not less than `LOWER`.

    A polar factor takes one step for each factor of 4 in it, and every step adds rounding errors: of well-conditioned
    bases 4 do instead of 10, with a sixth of the error. A power of two: few polynomials and CUDA graphs serve all.
    """
    factors = torch.linalg.cholesky_ex(bases.mT @ bases, upper=True).L
    found = min(torch.stack([_extremes(factor)[1] for factor in factors]).nan_to_num(0.0).tolist())
    return max(2.0 ** math.floor(math.log2(found / 2)), LOWER) if found > LOWER else LOWER


def _reconstructed(
    parts: list[MatmulSubspaces], weights: Sequence[float], left: Polar, right: Polar, precision: Precision
) -> MatmulMerge:
    """Put the weighted cores between the polar factors."""
    numbers = arithmetic(precision)
    core = torch.block_diag(*(f * part.core for f, part in zip(weights, parts, strict=True)))  # type: ignore[no-untyped-call]
    size = core.abs().amax().clamp(min=torch.finfo(core.dtype).tiny)
    inner = numbers.multiply(numbers.load(left.matrix), numbers.load(core / size))
    merged = numbers.dense(numbers.multiply(inner, numbers.load(right.matrix).mT))
    return MatmulMerge(
        (merged.double() * size).to(merged.dtype),
        tuple(parts),
        max(float(left.orthogonality), float(right.orthogonality)),
        max(left.steps, right.steps),
    )


def _extremes(R: Tensor) -> tuple[Tensor, Tensor]:
    """Estimate the largest (from below) and smallest (from above) singular value of a triangular matrix."""
    large = small = gaussian(R.shape[0], 4, R.device)
    for _ in range(8):
        large = R.mT @ (R @ (large / torch.linalg.vector_norm(large, dim=0)))
        small = small / torch.linalg.vector_norm(small, dim=0)
        small = torch.linalg.solve_triangular(R.mT, small, upper=False)
        small = torch.linalg.solve_triangular(R, small, upper=True)
    largest, inverse = (torch.linalg.vector_norm(v, dim=0).amax().sqrt() for v in (large, small))
    return largest, 1 / inverse
