"""Leading singular subspaces from matrix products alone, with measurements of their error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..on_device import gaussian
from ..orthonormal import cholesky_qr, upper_gram
from ..spectral_density import lanczos_rules
from .cuda_graph import replayed
from .near_cut import Step, below_filter, near_cut
from .number_formats import Precision, arithmetic, padded
from .purification import batches, compress, leading_eigenspaces

# Measured amplification of rounding errors, see benchmarks/spectral_accuracy.py. The polar factors amplify errors of
# the bases. Errors of the Gram matrix count most if the spectrum is flat at the cut.
POLAR_AMPLIFICATION, GRAM_AMPLIFICATION = 128, 8

# Invariance that rounding explains, in eps of the format: twice the largest one of good results.
INVARIANCE_FLOOR = 16

# A singular value smaller than the largest by more than this factor is float32 rounding: k is above the numerical rank.
LARGEST_RATIO = 2.0**22

# The estimate assumes that the entries of a residual have similar sizes. In about a hundred random spectra, the mixing
# of directions was 0.1 to 3 times the estimate with the factor 1, and mostly half of it.
ALIKE = 1.5

# The same for a single pair of directions. In 1,600 matrices of a tenth of full rank, cut after 1 or 2 directions, the
# mixing was above twice the estimate once (2.16 times), and 61 times without this term (up to 5.7 times).
ALONE = 2.0

PROBES = 16

# From this number of columns on a second solve costs more than the steps that foresee it.
FORESEEN_FROM = 256

# Largest error estimate that is accepted without a second solve, relative to the merged matrix.
TOLERANCE: dict[Precision, float] = {"float64": 1e-9, "float32": 5e-5, "fp16x3": 5e-5, "fp16": 5e-2}


@dataclass(frozen=True)
class ProductsSubspaces:
    """Leading singular subspaces ``D ~ U core Vh`` of one matrix, with measurements.

    Attributes:
        U: (m, k) float64, orthonormal columns.
        core: (k, k) float64.
        Vh: (k, n) float64, orthonormal rows.
        orthogonality: ``norm(Q^T Q z - z) / norm(z)`` for random vectors z, the larger one of U and V.
        residual: ``norm(D V - U core) / norm(D)``: the error of the factorisation.
        invariance: ``norm(D^T U - V core^T) / norm(D)``: distance of the subspaces from singular ones.
        rank_defect: distance of the projector's trace from k. Beyond 0.1 the boundary at k was not resolved.
        smallest: estimate of ``sigma_k``, rather above than below.
        ratio: estimate of ``sigma_1 / sigma_k``, rather below than above.
        error_estimate: expected error of the merged matrix, ``eps (128 + 8 h^2)`` with eps of the format and h the
            ratio, or ``level / sigma_k`` if the spectrum was compressed; plus the part of
            `invariance` beyond rounding, over ``sigma_k``. Infinite if the projector is none (`rank_defect`) or k above
            the numerical rank (`ratio`): the caller must take another solver.
        subspace_error: estimated sine of the angle to the exact subspaces (Frobenius norm over all directions), from
            `invariance` and the spectrum near the cut.
        gap: lower bound of ``(sigma_k - sigma_(k+1)) / sigma_k``.
        inside: (k, 8) float64, unit vectors in the coordinates of `Vh`: four near the direction of ``sigma_k``, which
            is most likely wrong, and four random ones.
        left_inside: (k, 8), the same in the coordinates of `U`.
        left_beyond: (m, 8) float64, unit vectors towards which `U` may be turned: four near the direction of
            ``sigma_(k+1)``, and four of the residual.
        right_beyond: (n, 8), the same for `Vh`.
        outer_steps: squares of full size.
        inner_steps: squares of about 1.2 k.
        compressed: whether the spectrum was compressed in float64 before.
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
    subspace_error: float
    gap: float
    inside: Tensor
    left_inside: Tensor
    left_beyond: Tensor
    right_beyond: Tensor
    outer_steps: int
    inner_steps: int
    compressed: bool

    def transposed(self) -> ProductsSubspaces:
        """Return the subspaces of the transposed matrix."""
        return replace(
            self,
            U=self.Vh.mT,
            core=self.core.mT,
            Vh=self.U.mT,
            inside=self.left_inside,
            left_inside=self.inside,
            left_beyond=self.right_beyond,
            right_beyond=self.left_beyond,
        )


def products_subspaces(
    matrices: Tensor,
    ranks: Sequence[int],
    precision: Precision = "fp16x3",
    levels: Tensor | None = None,
    gram: Tensor | None = None,
) -> list[ProductsSubspaces]:
    """Find leading singular subspaces of a batch of matrices by purification of their short-side Gram matrices.

    Args:
        matrices: (B, m, n) float32 or float64, finite.
        ranks: B ranks in 1..min(m, n), none above the numerical rank.
        precision: ``fp16x3`` (exact mode), ``fp16`` (fast mode), or ``float32``, ``float64``.
        levels: (B,) estimates of the k-th singular value, better too large than too small. With them the Gram matrix
            and ``D V`` are computed in float64 and the spectrum is compressed, see `purification.compress`: for large
            ``sigma_1 / sigma_k``.
        gram: of tall matrices in units as `in_units` makes them, if it is known.
    """
    if matrices.shape[-2] < matrices.shape[-1]:
        return [part.transposed() for part in products_subspaces(matrices.mT, ranks, precision, levels)]
    numbers = arithmetic(precision)
    exact, unit = in_units(matrices)
    if levels is None:
        gram = numbers.dense(numbers.gram(numbers.load(exact, bounded=True))) if gram is None else gram
        spaces = leading_eigenspaces(gram, ranks, precision)
    else:
        gram = compress(upper_gram(exact), (levels.double() / unit).square())
        spaces = leading_eigenspaces(gram, ranks, precision, largest=torch.ones_like(unit))
    found: list[tuple[Tensor, ...]] = []
    measured: list[Tensor] = []
    for group in batches(ranks):
        D, V = exact[group], torch.stack(spaces.bases[group])
        if levels is None:
            factor = numbers.load(padded(V, V.shape[-1]), bounded=True)
            image = numbers.dense(numbers.multiply(numbers.load(D, bounded=True), factor))[..., : V.shape[-1]]
        else:
            image = D @ V
        U, R = cholesky_qr(image, passes=1 if levels is None else 2)
        skew = torch.maximum(_isometry(U), _isometry(V))
        largest, smallest, last = extremes(R)
        residuals, relative = _residuals(D, U, R, V)
        found += zip(U, R * unit[group, None, None], V, *_directions(D, R, V, last, relative), strict=True)
        measured += torch.stack([skew, *residuals, largest, smallest], 1).unbind()
    rest = (spaces.rank_defect, spaces.outer_steps, spaces.inner_steps, unit, spaces.largest)
    table = torch.cat(
        [
            torch.stack(measured),
            torch.stack([x.double() for x in (*rest, unit if levels is None else levels)], 1),
            spaces.outer_history.flatten(1),
            spaces.inner_history.flatten(1),
        ],
        1,
    )
    n = exact.shape[-1]
    return [
        _summarize(own, row, numbers.eps, n, width, levels is not None)
        for own, row, width in zip(found, table.tolist(), spaces.widths, strict=True)  # waits here
    ]


def in_units(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Return the matrices over powers of two (B,) above their largest entries, so that no square overflows; float64."""
    exact = matrices.double()
    exponent = torch.frexp(exact.abs().amax((-2, -1)).clamp(min=2.0**-1000)).exponent
    unit = torch.ldexp(torch.ones_like(exact[:, 0, 0]), exponent)
    return exact / unit[:, None, None], unit


def accurate_subspaces(
    matrices: Tensor, ranks: Sequence[int], precision: Precision = "fp16x3", tolerance: float | None = None
) -> list[ProductsSubspaces]:
    """Find leading singular subspaces, of steep spectra after compression.

    A few Lanczos steps foresee which spectra are steep. Others whose `error_estimate` is too large are solved again.

    Args:
        matrices: as for `products_subspaces`.
        ranks: as for `products_subspaces`.
        precision: as for `products_subspaces`.
        tolerance: largest error estimate that is accepted; infinity to compress nothing, 0 to compress always, None
            for `TOLERANCE`.
    """
    if matrices.shape[-2] < matrices.shape[-1]:
        return [part.transposed() for part in accurate_subspaces(matrices.mT, ranks, precision, tolerance)]
    limit = TOLERANCE[precision] if tolerance is None else tolerance
    levels, gram = _foreseen_levels(matrices, ranks, precision, limit)
    parts: list[ProductsSubspaces | None] = [None] * len(matrices)
    for compressed in (True, False):
        chosen = [i for i, level in enumerate(levels) if (level is not None) == compressed]
        if compressed:
            _solve_some(parts, chosen, matrices, ranks, precision, [levels[i] for i in chosen])
        else:
            _solve_some(parts, chosen, matrices, ranks, precision, None, gram)
    found = [part for part in parts if part is not None]
    again = [
        i
        for i, part in enumerate(found)
        if not part.compressed and part.error_estimate > limit and part.ratio < LARGEST_RATIO
    ]
    _solve_some(parts, again, matrices, ranks, precision, [found[i].smallest for i in again])
    return [part for part in parts if part is not None]


def _solve_some(
    parts: list[ProductsSubspaces | None],
    chosen: Sequence[int],
    matrices: Tensor,
    ranks: Sequence[int],
    precision: Precision,
    levels: Sequence[float | None] | None,
    gram: Tensor | None = None,
) -> None:
    """Solve the matrices of some indices in one batch, with compressed spectra if there are levels."""
    if not chosen:
        return
    given = None if levels is None else torch.tensor(levels, dtype=torch.float64, device=matrices.device)
    batch = matrices
    if len(chosen) < len(matrices):
        batch, gram = matrices[list(chosen)], None if gram is None else gram[list(chosen)]
    solved = products_subspaces(batch, [ranks[i] for i in chosen], precision, given, gram)
    for i, part in zip(chosen, solved, strict=True):
        parts[i] = part


def _foreseen_levels(
    matrices: Tensor, ranks: Sequence[int], precision: Precision, limit: float
) -> tuple[list[float | None], Tensor | None]:
    """Return ``sigma_k``, rather too large, of each matrix whose spectrum must be compressed; None for the others.

    It is estimated from a few Lanczos steps, so that most of these matrices are solved only once. Also returns the Gram
    matrices of these steps, see `products_subspaces`, if any were taken.

    Args:
        matrices: tall ones.
        ranks: as for `products_subspaces`.
        precision: as for `products_subspaces`.
        limit: largest error estimate that is accepted without compression.
    """
    numbers = arithmetic(precision)
    # From this sigma_1 / sigma_k on the error estimate is above the limit.
    ratio = max(limit / numbers.eps - POLAR_AMPLIFICATION, 0.0) ** 0.5 / GRAM_AMPLIFICATION**0.5
    if math.isinf(ratio) or matrices.shape[-1] < FORESEEN_FROM:
        return [None] * len(matrices), None
    exact, unit = in_units(matrices)
    gram = numbers.dense(numbers.gram(numbers.load(exact, bounded=True)))
    rules = lanczos_rules(gram.float(), run=replayed)
    assert rules is not None
    levels: list[float | None] = []
    for own, rank, scale in zip(rules, ranks, unit.tolist(), strict=True):
        share = own.shares([max(rank - rank // 16, 0)])[0]
        steep = share * ratio**2 < 1
        levels.append((share * own.largest) ** 0.5 * scale if steep and share > 2.0**-40 else None)
    return levels, gram


def _summarize(
    found: tuple[Tensor, ...],
    measured: list[float],
    eps: float,
    n: int,
    width: int,
    compressed: bool,
) -> ProductsSubspaces:
    """Put U, core, V and the directions of errors of one matrix together with their measurements."""
    U, core, V, inside, left_inside, left_beyond, right_beyond = found
    skew, norm, residual, invariance, relative, largest, smallest, rank_defect, outer_steps, inner_steps = measured[:10]
    unit, bound, level = measured[10:13]
    histories = measured[13:]
    outer, inner = (_steps(half) for half in (histories[: len(histories) // 2], histories[len(histories) // 2 :]))
    norm = max(norm, torch.finfo(torch.float64).tiny)
    ratio = largest / smallest if smallest > 0 else float("inf")
    usable = ratio < LARGEST_RATIO and rank_defect < 0.1
    height = level / (smallest * unit) if compressed and usable else ratio
    estimate = eps * (POLAR_AMPLIFICATION + GRAM_AMPLIFICATION * height**2)
    # The part that rounding does not explain. It arises if the first level stopped too early, which the second one
    # cannot detect.
    estimate += (
        max(invariance / norm - INVARIANCE_FLOOR * eps, 0.0) * norm / max(smallest, torch.finfo(torch.float64).tiny)
    )
    rank = V.shape[1]
    shift = (level / unit) ** 2 if compressed else 0.0

    def eigenvalue(x: float) -> float:
        """Undo the lift, the scaling and the compression of the purified matrix."""
        x = max(x - (4 if width == n else 8) * eps, 0.0) * bound
        return shift * x / max(1 - x, 1e-16) if compressed else x

    near = near_cut(inner, rank, width - rank, eps, eigenvalue)
    subspace_error, gap = float("inf"), 0.0
    if usable and near.pairs < math.inf:
        beyond = eigenvalue(below_filter(outer, width)) if width < n else 0.0
        pairs = near.pairs
        if width < n:
            pairs += rank * (n - width) * (near.kept / (near.kept - beyond)) ** 2 if near.kept > beyond else math.inf
        alike = ALIKE * relative * math.sqrt(pairs / (n * rank))
        # If one pair dominates, nothing averages, and its entry is one of the few of the second level.
        closest = near.kept / (near.kept - near.dropped)
        dominance = closest / math.sqrt(pairs) if pairs else 0.0
        alike = math.hypot(alike, ALONE * dominance * relative * closest / math.sqrt(width * rank))
        subspace_error = min(alike, 2 * relative * near.kept / (near.kept - near.dropped)) + eps
        gap = near.gap
    return ProductsSubspaces(
        U,
        core,
        V.mT,
        orthogonality=skew,
        residual=residual / norm,
        invariance=invariance / norm,
        rank_defect=rank_defect,
        smallest=smallest * unit,
        ratio=ratio,
        error_estimate=estimate if usable else float("inf"),
        subspace_error=subspace_error,
        gap=gap,
        inside=inside,
        left_inside=left_inside,
        left_beyond=left_beyond,
        right_beyond=right_beyond,
        outer_steps=int(outer_steps),
        inner_steps=int(inner_steps),
        compressed=compressed,
    )


def _steps(history: list[float]) -> list[Step]:
    """Return the steps of a purification from its history, see `Purified`."""
    steps = []
    for trace, square_norm, shrink in zip(history[::3], history[1::3], history[2::3], strict=True):
        steps.append(Step(trace, square_norm, shrink > 0))
        if shrink < 0:
            break
    return steps


def _residuals(D: Tensor, U: Tensor, R: Tensor, V: Tensor) -> tuple[list[Tensor], Tensor]:
    """Return the norms of D and of the residuals of ``D V = U R``, ``D^T U = V R^T`` and ``D^T U R^-T = V``.

    The residuals are measured on random vectors. Also returns the last one itself: (B, n, any number).
    """
    z = gaussian(R.shape[-1], PROBES, R.device)
    inverse = torch.linalg.solve_triangular(R.mT, z, upper=False)
    # Of two right sides at once: each product reads a large matrix.
    ahead = D.mT @ (U @ torch.cat([inverse, z.expand_as(inverse)], -1))
    relative = ahead[..., :PROBES] - V @ z
    residuals = (D @ (V @ z) - U @ (R @ z), ahead[..., PROBES:] - V @ (R.mT @ z), relative)
    return [norms_of(D), *(norms_of(x) / PROBES**0.5 for x in residuals)], relative


def norms_of(matrices: Tensor) -> Tensor:
    """Return the Frobenius norm of each matrix."""
    norms: Tensor = torch.linalg.vector_norm(matrices, dim=(-2, -1))
    return norms


def _isometry(Q: Tensor) -> Tensor:
    """Return ``norm(Q^T Q z - z) / norm(z)`` of each matrix for random vectors z."""
    z = gaussian(Q.shape[-1], PROBES, Q.device)
    return norms_of(Q.mT @ (Q @ z) - z) / norms_of(z)


def _directions(D: Tensor, R: Tensor, V: Tensor, last: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
    """Return the likely directions of errors, see `ProductsSubspaces`: inside and beyond, on both sides."""
    some = unit_columns(residual[..., : last.shape[-1]])
    beyond = some
    for _ in range(6):
        beyond = D.mT @ (D @ beyond)
        beyond = torch.baddbmm(beyond, V, V.mT @ beyond, alpha=-1)
    right = torch.cat([unit_columns(beyond), some], -1)
    others = unit_columns(gaussian(V.shape[-1], last.shape[-1], V.device))
    inside = torch.cat([last, others.expand_as(last)], -1)
    return inside, unit_columns(R @ inside), unit_columns(D @ right), right


def unit_columns(columns: Tensor) -> Tensor:
    """Scale columns to norm 1; columns of zeros stay zero."""
    norms: Tensor = torch.linalg.vector_norm(columns, dim=-2, keepdim=True)
    return columns / norms.clamp(min=torch.finfo(columns.dtype).tiny)


# Rounds of power iteration; vectors are scaled before the rounds of these numbers, and stay far from overflow.
ROUNDS, SCALED = 8, (4, 7)


def extremes(R: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Estimate the largest (from below) and smallest (from above) singular value of triangular matrices.

    The third result (..., k, 4) holds unit vectors near the right singular vector of the smallest.
    """
    return (largest_singular_value(R), *smallest_singular_value(R))


def largest_singular_value(R: Tensor) -> Tensor:
    """Estimate the largest singular value of matrices from below, by power iteration."""
    v = gaussian(R.shape[-1], 4, R.device)
    for turn in range(ROUNDS):
        v = R.mT @ (R @ (unit_columns(v) if turn in SCALED else v))
    largest: Tensor = torch.linalg.vector_norm(v, dim=-2).amax(-1).sqrt()
    return largest


def smallest_singular_value(R: Tensor) -> tuple[Tensor, Tensor]:
    """Estimate the smallest singular value of triangular matrices from above, see `extremes`; NaN for singular ones."""
    v = gaussian(R.shape[-1], 4, R.device)
    for turn in range(ROUNDS):
        v = solve_gram(R, unit_columns(v) if turn in SCALED else v)
    norms = torch.linalg.vector_norm(v, dim=-2, keepdim=True)
    return norms.flatten(-2).amax(-1).rsqrt(), v / norms


def solve_gram(R: Tensor, z: Tensor) -> Tensor:
    """Return ``(R^T R)^-1 z`` for upper triangular R."""
    halfway = torch.linalg.solve_triangular(R.mT, z, upper=False)
    solution: Tensor = torch.linalg.solve_triangular(R, halfway, upper=True)
    return solution
