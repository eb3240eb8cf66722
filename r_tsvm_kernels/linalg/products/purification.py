"""Leading eigenspaces from matrix products alone: trace-steered spectral purification."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...ops import SymmetricProduct, first_steering
from ..on_device import gaussian, to_device
from ..orthonormal import cholesky_qr
from .cuda_graph import replayed
from .number_formats import Arithmetic, Operand, Precision, arithmetic, padded

OVERSAMPLING = 0.2
# Limits that only spectra without a gap at the wanted rank reach. With rounding errors of float32, at most 52 steps
# were seen with a gap (1e-4 in a nearly flat spectrum), and 75 or more without one, when rounding errors are lifted to
# a projector. In float64, 90 steps resolve a relative gap of 1e-9.
STEPS: dict[Precision, int] = {"float64": 90, "float32": 64, "fp16x3": 64, "fp16": 64}


# fp16 can hold up to twice as much.
LARGE = 2.0**15

# Shift of `cholesky_qr` for columns that are nearly orthonormal, or zeros.
SHIFT = 2.0**-58

# Products of a sketch with the filter. After the first one, noise of the format is up to 1e4 times as large: in one
# plane that is as large as the columns.
ROUNDS: dict[Precision, int] = {"float64": 3, "float32": 3, "fp16x3": 3, "fp16": 4}


@dataclass(frozen=True)
class Purified:
    """The (nearly) idempotent matrix at the end of a purification.

    Attributes:
        matrix: projector, in the arithmetic's format.
        trace: (...) its trace, which is its rank.
        impurity: (...) ``sum x (1 - x)`` over its eigenvalues x.
        steps: (...) int32, number of squares.
        history: (..., most squares + 1, 3) float64, before each step: trace, squared norm, and 1 if the step
            shrinks, 0 if it grows, -1 after the last one.
    """

    matrix: Operand
    trace: Tensor
    impurity: Tensor
    steps: Tensor
    history: Tensor


@dataclass(frozen=True)
class Eigenspaces:
    """Orthonormal bases of leading eigenspaces with measurements.

    Attributes:
        bases: one (n, k_i) float64 matrix for each Gram matrix.
        rank_defect: (B,) distance of the last projector's trace from k_i; beyond 0.1 the boundary was not resolved.
        impurity: (B,) ``sum x (1 - x)`` over its eigenvalues x.
        outer_steps: (B,) squares of size n.
        inner_steps: (B,) squares of about 1.2 k_i, 0 if one level sufficed.
        largest: (B,) float64, divisor of the eigenvalues, which brings them into [0, 1].
        outer_history: of the purification of the whole matrices, see `Purified`.
        inner_history: of the second level; of the first if one level sufficed.
        widths: dimensions of the second level's matrices; n if one level sufficed.
    """

    bases: list[Tensor]
    rank_defect: Tensor
    impurity: Tensor
    outer_steps: Tensor
    inner_steps: Tensor
    largest: Tensor
    outer_history: Tensor
    inner_history: Tensor
    widths: tuple[int, ...]


def purify(
    start: SymmetricProduct,
    rank: Tensor,
    tolerances: Sequence[tuple[Tensor, Tensor]],
    extra: int,
    numbers: Arithmetic,
    steps: int,
) -> Purified:
    """Turn symmetric X with spectrum in [0, 1] into the projector on its leading eigenspace.

    SP2 (Niklasson, Phys. Rev. B 66, 155115): ``X <- X X`` or ``2 X - X X``, whichever brings the trace nearer to
    `rank`; the trace of ``X X`` is the squared norm of X, so it is known before the step. A matrix is done `extra`
    squares after ``|tr X - rank| < slack`` and ``tr X - tr X X < impurity`` for one pair of `tolerances`. The device
    decides this: all `steps` squares are launched, and those of finished matrices do nothing.

    Args:
        start: a batch of matrices.
        rank: (B,) wanted traces.
        tolerances: pairs (slack, impurity), (B,) each: of the trace, and of ``sum x (1 - x)`` over the eigenvalues.
        extra: squares after the tolerances are met, at least 1.
        numbers: format of the products.
        steps: largest number of squares, at least 1.
    """
    X, spare = start.matrix, None
    steering = first_steering(start.trace, start.square_norm, rank, tolerances, extra)
    history, following = [steering.summary], numbers.scaled(X, steering)
    for _ in range(steps):
        if _all(following.done):
            break
        old = X
        X, following = numbers.step(X, following, spare)
        spare = old if old is not start.matrix else None  # the caller's
        history.append(following.summary)
    table = torch.stack(history).movedim(-1, 0)  # (B, steps, 3)
    state = table[..., -1]
    state[:, -1] = -1.0
    rest = table[:, -1:].expand(-1, steps + 1 - len(history), -1)
    trace, square_norm, _ = table[:, -1].unbind(-1)
    return Purified(
        X,
        trace,
        trace - square_norm,
        (state >= 0).sum(-1, dtype=torch.int32),
        torch.cat([table, rest], 1).double(),
    )


def _all(done: Tensor) -> bool:
    """Return whether all matrices are done; always False on a GPU, because reading the answer would wait for it."""
    return not done.is_cuda and bool(done.all())


def leading_eigenspaces(
    gram: Tensor,
    ranks: Sequence[int],
    precision: Precision = "fp16x3",
    oversampling: float = OVERSAMPLING,
    largest: Tensor | None = None,
) -> Eigenspaces:
    """Return orthonormal bases of the top-k_i eigenspaces of symmetric positive semidefinite matrices.

    Two levels. A purification of the whole matrix aims at ``k + p/2`` and stops early, when it separates the first k
    eigenvalues from those beyond k + p; p is `oversampling` times k. A random sketch of k + p columns, multiplied with
    that filter a few times, spans the wanted eigenspace; in its coordinates, the matrix of size k + p is purified
    to rank k exactly. Cost: about 20 to 36 symmetric products of size n.

    Both bases are products in the given format. The first is made orthonormal in float64, because its defects would be
    errors of the smaller matrix, which a small gap at k amplifies; then the product of both.

    A rank above the numerical rank gives arbitrary null directions: the caller must clip it. On a GPU everything is
    launched without a wait for the device; both purifications can be CUDA graphs, see `use_cuda_graphs`.

    Args:
        gram: (B, n, n) float32 or float64, exactly symmetric.
        ranks: B numbers in 1..n.
        precision: format of the products.
        oversampling: p / k.
        largest: (B,) an upper bound of the eigenvalues; None takes `largest_eigenvalue`.
    """
    numbers = arithmetic(precision)
    n = gram.shape[-1]
    extra = [min(max(math.ceil(oversampling * k), 8), n - k) for k in ranks]
    width = [k + p for k, p in zip(ranks, extra, strict=True)]
    largest = largest_eigenvalue(gram) if largest is None else largest
    scaled = gram / largest[:, None, None]
    start = _lifted(scaled, numbers)
    counts = torch.tensor([ranks, extra], dtype=scaled.dtype, device="cpu")
    wanted, spread = to_device(counts, scaled.device)
    columns = max(width)

    if 4 * columns > 3 * n:  # the second level would be as large as the first
        whole = _to_rank(start, wanted, numbers, STEPS[precision])
        bases = _range_of(whole.matrix, gaussian(n, max(ranks), gram.device), ranks, numbers, rounds=2)
        return Eigenspaces(
            columns_of(_orthonormal(bases, ranks, numbers), ranks),
            (whole.trace - wanted).abs(),
            whole.impurity,
            whole.steps,
            torch.zeros_like(whole.steps),
            largest.double(),
            whole.history,
            whole.history,
            (n,) * len(ranks),
        )

    # The second pair: near a projector of any rank from k to k + p, which is all that exact low rank allows.
    tolerances = [(spread / 4, spread / 8), (spread / 2 + 0.25, torch.full_like(spread, 0.25))]
    coarse = replayed(purify, start, wanted + spread / 2, tolerances, 4, numbers, STEPS[precision])
    filtered = _range_of(coarse.matrix, gaussian(n, columns, gram.device), width, numbers, rounds=ROUNDS[precision])
    spans = numbers.load(padded(_orthonormal(filtered, width, numbers), columns), bounded=True)
    inner = numbers.dense(numbers.multiply(spans.mT, numbers.multiply(start.matrix, spans)))
    fine = _to_rank(_lifted((inner + inner.mT) / 2, numbers), wanted, numbers, STEPS[precision])
    corners = _range_of(fine.matrix, gaussian(inner.shape[-1], max(ranks), gram.device), ranks, numbers, rounds=2)
    return Eigenspaces(
        columns_of(_orthonormal(numbers.multiply(spans, corners), ranks, numbers), ranks),
        (fine.trace - wanted).abs(),
        fine.impurity,
        coarse.steps,
        fine.steps,
        largest.double(),
        coarse.history,
        fine.history,
        tuple(width),
    )


def largest_eigenvalue(gram: Tensor, rounds: int = 32) -> Tensor:
    """Bound the largest eigenvalue of each matrix from above; 1 for a zero matrix.

    The bound is the least of three. The first is from power iteration of four random vectors. In nearly flat spectra it
    does not converge, and the Ritz value is no bound. But an eigenvalue above it by more than a factor of
    ``(100 n)^(1 / (2 rounds + 1))``, 1.2 for n = 4096, would have outgrown the rest, unless the vectors had less than a
    10 sqrt(n)-th of their length in its direction. The second is from trace and norm (Wolkowicz and Styan, Linear
    Algebra Appl. 29, 1980), the third is the largest column sum. 1 % is added for rounding: repeated squares amplify
    eigenvalues above 1 until the leading eigenvector is lost.

    Args:
        gram: (B, n, n) symmetric positive semidefinite, of norms between 2^-30 and 2^30.
        rounds: of the power iteration, a multiple of 4.
    """
    n = gram.shape[-1]
    start = gaussian(n, 4, gram.device).to(gram.dtype).repeat(gram.shape[0], 1, 1)
    ritz = replayed(largest_ritz_value, gram, start, rounds)
    mean = gram.diagonal(dim1=-2, dim2=-1).mean(-1)
    variance = torch.linalg.vector_norm(gram, dim=(-2, -1)).square() / n - mean.square()
    least = torch.stack(
        [
            (100 * n) ** (1 / (2 * rounds + 1)) * ritz,
            mean + ((n - 1) * variance.clamp(min=0)).sqrt(),
            gram.abs().sum(-1).amax(-1),
        ]
    ).amin(0)
    return torch.where(least > 0, 1.01 * least, 1.0)


def largest_ritz_value(gram: Tensor, v: Tensor, rounds: int) -> Tensor:
    """Return the largest Ritz value of each matrix (B,) after a power iteration of the columns of v (B, n, any)."""
    tiny = torch.finfo(gram.dtype).tiny
    for step in range(1, rounds + 1):
        v = gram @ v
        if step % 4 == 0:
            v = v / torch.linalg.vector_norm(v, dim=-2, keepdim=True).clamp(min=tiny)
    return (v * (gram @ v)).sum(-2).amax(-1)


def compress(gram: Tensor, level: Tensor) -> Tensor:
    """Return ``G (G + level I)^-1`` in float64: the same eigenvectors, eigenvalues ``x / (x + level)``.

    With `level` near the wanted eigenvalue, much larger eigenvalues come close to 1, and their rounding errors no
    longer hide it: the loss depends only on the relative gap at `level`, not on the ratio of the largest eigenvalue to
    it. Takes one Cholesky factorisation, and saves the squares that would lift `level`.

    Args:
        gram: (B, n, n) float64, symmetric positive semidefinite, not rounded to another dtype before; its upper
            triangle is read.
        level: (B,) positive.
    """
    shifted = gram.double().clone()
    shifted.diagonal(dim1=-2, dim2=-1).add_(level.double()[:, None])
    inverse = torch.cholesky_inverse(torch.linalg.cholesky_ex(shifted, upper=True).L, upper=True)
    compressed = -level.double()[:, None, None] * ((inverse + inverse.mT) / 2)
    compressed.diagonal(dim1=-2, dim2=-1).add_(1.0)
    return compressed


def _lifted(matrix: Tensor, numbers: Arithmetic) -> SymmetricProduct:
    """Load a matrix with spectrum in [0, 1], shifted up a little.

    Steps of the form ``2 X - X X`` double an eigenvalue near 0. An eigenvalue that rounding made negative would
    diverge.
    """
    lifted = matrix.clone()
    lifted.diagonal(dim1=-2, dim2=-1).add_(4 * numbers.eps)
    return numbers.measured(numbers.load(lifted, bounded=True))


def _to_rank(start: SymmetricProduct, wanted: Tensor, numbers: Arithmetic, steps: int) -> Purified:
    """Purify until only rounding remains: an impurity of 1e-3 falls to its square in two steps."""
    limit = torch.clamp(0.5 * numbers.eps * wanted, min=1e-3)
    extra = 8 if numbers.eps < 1e-12 else 4
    return replayed(purify, start, wanted, [(torch.full_like(wanted, 0.5), limit)], extra, numbers, steps)


def _range_of(projector: Operand, sketch: Tensor, ranks: Sequence[int], numbers: Arithmetic, rounds: int) -> Operand:
    """Return the product of a batch of (fuzzy) projectors and bases of their ranges, (B, n, largest rank, padded).

    The first ranks[i] columns of each count, the others are zeros. One product with a random matrix has condition 1e3
    to 1e4 and multiplies the projector's noise by it; from the second round on the columns are nearly orthonormal
    before and after.
    """
    columns = max(ranks)
    if len(set(ranks)) == 1:
        sketches = padded(sketch, columns).expand(len(ranks), -1, -1)
    else:
        sketches = torch.stack([padded(sketch[:, :rank], columns) for rank in ranks])
    bases = numbers.load(sketches, bounded=True)
    for turn in range(rounds):
        if turn:
            bases = _nearly_orthonormal(bases, numbers)
        bases = numbers.multiply(projector, bases)
    return bases


def _nearly_orthonormal(columns: Operand, numbers: Arithmetic) -> Operand:
    """Return a basis of the same columns, orthonormal but for those that rounding hides in their Gram matrix.

    Columns of zeros stay zero. In float64 a projector of lower rank reduces the other columns to rounding errors; a
    second pass makes unit vectors of these, or they would vanish in later rounds. In other formats a projector's errors
    are larger than that. One plane alone is too coarse for a Gram matrix.
    """
    if not 1e-12 < numbers.eps < 1e-6:
        product = numbers.dense(columns)
        for _ in range(2 if numbers.eps < 1e-12 else 1):
            product = cholesky_qr(product, 1)[0]
        return numbers.load(product)
    gram = numbers.dense(numbers.gram(columns)).double()
    shift = torch.linalg.vector_norm(gram, dim=(-2, -1)).clamp(min=torch.finfo(torch.float32).tiny)
    gram.diagonal(dim1=-2, dim2=-1).add_(shift[:, None], alpha=2 * numbers.eps)
    # The factor needs float64, or it might not exist; its inverse is rounded to planes.
    upper = torch.linalg.cholesky_ex(gram, upper=True).L.float()
    identity = torch.eye(upper.shape[-1], device=upper.device)
    # Larger factors belong to columns of zeros.
    inverse = torch.linalg.solve_triangular(upper, identity.expand_as(upper), upper=True).clamp(-LARGE, LARGE)
    return numbers.multiply(columns, numbers.load(inverse, bounded=True))


def _orthonormal(columns: Operand, ranks: Sequence[int], numbers: Arithmetic) -> Tensor:
    """Return an orthonormal basis of the first ranks[i] of each matrix's columns, which are nearly that.

    (B, n, largest rank) float64, filled up with zeros.
    """
    product = numbers.dense(columns)
    parts = [cholesky_qr(product[group, :, : ranks[group.start]], 1, SHIFT)[0] for group in batches(ranks)]
    if len(parts) == 1:
        return parts[0]
    return torch.cat([torch.nn.functional.pad(part, (0, max(ranks) - part.shape[-1])) for part in parts])


def columns_of(bases: Tensor, ranks: Sequence[int]) -> list[Tensor]:
    """Return the first ranks[i] columns of each matrix."""
    return [basis[:, :rank] for basis, rank in zip(bases, ranks, strict=True)]


def batches(ranks: Sequence[Hashable]) -> list[slice]:
    """Return parts of a batch of matrices that have one rank each: all of it, or single matrices."""
    if len(set(ranks)) == 1:
        return [slice(0, len(ranks))]
    return [slice(index, index + 1) for index in range(len(ranks))]
