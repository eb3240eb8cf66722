"""The leading right singular vectors of one tall matrix, from its Gram matrix.

Two routes. ``gram-float64``: Gram matrix and eigenvectors in float64, corrected only if the estimated error is too
large. ``gram-float32``: both in float32, which is twice as fast, then always corrected in float64. Only the mixing
between leading and other eigenvectors matters, and its first-order correction costs a few thin products:

    X[i, j] = (V_other^T R)[i, j] / (lambda_j - lambda_i),   R = D^T D V - V (V^T D^T D V),   V <- V + V_other X

Some eigenvectors are resolved, if their eigenvalues are too close for this correction, or smaller than the rounding
errors of the Gram matrix: the problem in their span is solved again, in float64, from the images ``D V``, whose
rounding is not squared. The remaining error is measured on random vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..errors import ConvergenceError
from .decompositions import eigh
from .on_device import gaussian
from .orthonormal import cholesky_whitened
from .rounding import BACKWARD_ERROR, root_errors
from .spectral_density import eigenvalues_at
from .tall_matrix import TallMatrix
from .two_stage import Reduced, two_stage_pays

# Below this share of the largest eigenvalue, the eigenvectors of a float32 Gram matrix are too inaccurate to be
# corrected.
FLOAT32_FLOOR = 1e-3
# From a mean distance of the eigenvalues around the cut, relative to the largest eigenvalue, corrections sufficed in
# 150 spectra of 512 and 1024 columns to an error of EXACT_TOLERANCE, with four exceptions. Below it they mostly failed,
# and lost what the decomposition in float32 costs: as much as one in float64, which takes a quarter longer if it is
# the first.
SPACING, EXACT_TOLERANCE = 4e-5, 2e-8
# If the largest eigenvalue is below so many times their mean, corrections always sufficed.
NEARLY_FLAT = 8.0
# If the smallest wanted eigenvalue is below this share of the largest, all low eigenvectors are resolved, not only
# those near the cut. One round may be a correction; each of the others makes the low ones more accurate.
LOW, RESOLVE = 1e-5, 5
# A correction squares the error, or shrinks it at least as much as the previous one. If the error is larger than this,
# two corrections are not enough, and float64 from the start is cheaper than three.
CORRECTABLE, CORRECTIONS = 3e-3, 2
PROBES = 16
# Measured without any other eigenvector, the error is 3e-15 to 8e-15 times the norm of all eigenvalues, over the gap at
# the cut (512 to 2048 columns, flat spectra and powers). If that is at most such a share of the tolerance, no other
# eigenvector is computed.
GRAM_ROUNDING, FORESEEN = 8e-15, 1 / 16
WINDOW = 32
# Eigenvalues within this relative distance of one at the cut are resolved with it.
NEAR = 1e-6
# Random vectors may underestimate the mixing.
MEASURED = 2.0
# Eigenvalues measured together differ at most by this factor; those next to the cut by less.
GROUP, NARROW = 64.0, 4.0

# Largest shift of the eigenvalues next to the cut away from each other, as a share of the gap.
SHIFTED = 0.25


class ForeseenError(ConvergenceError):
    """A route would fail; it was not tried."""


# Maps all singular values, falling, and bounds of their errors to the number of leading ones; returns None if the
# errors leave the number open.
Choose = Callable[[Tensor, Tensor], int | None]


@dataclass(frozen=True)
class Eigenspace:
    """Leading eigenvectors of ``D^T D``.

    Attributes:
        V: (n, k) float64, orthonormal to rounding, ordered by falling eigenvalue.
        values: (n,) singular values of D, all of them, in its scaled units, falling.
        errors: (n,) bounds of their errors.
        error: estimated sine of the angle to the exact subspace (Frobenius norm over all directions), without the part
            that backward errors explain.
        spread: backward error beyond that of an SVD, relative to the largest singular value.
    """

    V: Tensor
    values: Tensor
    errors: Tensor
    error: float
    spread: float


def gram_float64(matrix: TallMatrix, choose: Choose, tolerance: float) -> Eigenspace:
    """Return the leading eigenspace by float64 Gram matrix and eigenvectors.

    Args:
        matrix: D.
        choose: returns the wanted dimension, see `Choose`.
        tolerance: estimated error above which eigenvectors are resolved.

    Raises:
        ConvergenceError: the dimension is not certain, the estimated error is too large, or the decomposition failed.
    """
    values, Q, lowest = _decomposed(matrix, choose, tolerance)
    n, errors = len(values), root_errors(values, BACKWARD_ERROR)
    resolved, reason, corrected = slice(0, 0), "", False
    for _ in range(RESOLVE):
        rank, unknown = choose(values.flip(0).sqrt(), errors.flip(0)), n - Q.shape[1]
        if rank is None:
            reason, block = "singular values at the edge of the rank are lost in rounding", _low(values, 0.0)
        else:
            cut = n - rank
            V = Q[:, cut - unknown :]
            for by_size in (False, True):
                error, spread = _unresolved(matrix, V, Q[:, : cut - unknown], values, resolved, by_size=by_size)
                if error <= tolerance:
                    break
            if error <= tolerance:
                return Eigenspace(V.flip(1), values.flip(0).sqrt(), errors.flip(0), error, spread)
            reason, block = f"estimated error {error:.0e} of the subspace", _block(values, cut)
        if block == resolved or not block.stop:
            break
        if block.start < unknown:
            Q, unknown = torch.cat([lowest(unknown), Q], dim=1), 0
        if rank is not None and not unknown and not corrected:
            corrected = True
            with suppress(ConvergenceError):  # unless neighbours across the cut are too close to each other
                V, found = _corrected(matrix, Q[:, cut:], Q[:, :cut], values, 0)
                Q[:, :cut] = _orthogonal_to(V, Q[:, :cut])
                values[cut:], order = found.sort()
                Q[:, cut:] = V[:, order]
                continue
        own = slice(block.start - unknown, block.stop - unknown)
        Q[:, own], values[block] = _resolve(matrix, Q[:, own])
        errors[block] = root_errors(values[block], BACKWARD_ERROR).clamp(min=float(errors[-1]))
        resolved = block
    raise ConvergenceError(f"gram-float64: {reason}")


def _decomposed(matrix: TallMatrix, choose: Choose, tolerance: float) -> tuple[Tensor, Tensor, Callable[[int], Tensor]]:
    """Return the eigenvalues of the Gram matrix, rising, none negative, and its leading eigenvectors, or all.

    The third result computes a number of the others, those of the smallest eigenvalues.

    Args:
        matrix: D.
        choose: returns the wanted dimension. Unless the gap at the cut is wide, eigenvectors that would help to
            resolve them are returned as well.
        tolerance: of the leading subspace.
    """
    if matrix.eigenvectors is not None:
        values, Q = matrix.eigenvectors
        return values.clamp(min=0), Q.clone(), lambda number: Q[:, :number]
    gram = matrix.gram(torch.float64)
    if not two_stage_pays(len(gram), gram.device):
        values, Q = eigh(gram)
        return values.clamp_(min=0), Q, lambda number: Q[:, :number]
    reduced = Reduced(gram)
    values = reduced.values.clamp(min=0)
    n, falling = len(values), values.flip(0)
    rank = choose(falling.sqrt(), root_errors(falling, BACKWARD_ERROR))
    if rank is None:
        known = n
    else:
        gap = float(falling[rank - 1] - falling[rank]) if 0 < rank < n else 0.0
        wide = GRAM_ROUNDING * float(torch.linalg.vector_norm(falling)) <= FORESEEN * tolerance * gap
        known = rank if wide else rank + _window(n, rank)
    return values, reduced.vectors(known), lambda number: reduced.vectors(n, before=n - number)


def gram_float32(matrix: TallMatrix, rank: int, tolerance: float) -> Eigenspace:
    """Return the leading eigenspace by float32 eigenvectors, corrected until the estimated error is below `tolerance`.

    Raises:
        ForeseenError: the spectrum falls too far for float32, and nothing was decomposed.
        ConvergenceError: the corrections do not suffice, or the decomposition failed.
    """
    gram = matrix.gram(torch.float32)
    _foresee(gram, rank, tolerance)
    approximate, Q = eigh(gram)
    n = len(approximate)
    cut = n - rank
    if approximate[cut] <= FLOAT32_FLOOR * approximate[-1]:
        raise ConvergenceError("gram-float32: the smallest wanted singular value is too small")
    values, V, others = approximate.double(), Q[:, cut:].double(), Q[:, :cut]
    window = _window(n, rank)
    block = slice(cut - window, cut + window)
    for _ in range(CORRECTIONS):
        V, values[cut:] = _corrected(matrix, V, others, values, window)
        if window:
            below = _orthogonal_to(V, others[:, block.start :].double())
            near, values[block] = _resolve(matrix, torch.cat([below, V[:, :window]], dim=1))
            others[:, block.start :] = near[:, :window].to(others.dtype)
            V[:, :window] = near[:, window:]
        error, spread = _unresolved(matrix, V, others, values, block)
        if error <= tolerance:
            break
    if not error <= tolerance:
        raise ConvergenceError(f"gram-float32: estimated error {error:.0e} of the subspace, allowed {tolerance:.0e}")
    if window:
        below = others[:, block.start :].double()
        shift = _shift(
            matrix, V[:, :window], values[cut : block.stop], V[:, window:], values[block.stop :], values[cut - 1]
        )
        shift += _shift(
            matrix,
            below,
            values[block.start : cut],
            others[:, : block.start].double(),
            values[: block.start],
            values[cut],
        )
        if not shift <= SHIFTED * float(values[cut] - values[cut - 1]):
            raise ConvergenceError(
                "gram-float32: the gap at the cut is too small for the accuracy of float32 eigenvalues"
            )
    values = values.clamp(min=0).flip(0)
    return Eigenspace(V.flip(1), values.sqrt(), root_errors(values, 8 * 2.0**-24), error, spread)


def _foresee(gram: Tensor, rank: int, tolerance: float) -> None:
    """Estimate the eigenvalues around the cut, and whether corrections of float32 eigenvectors can suffice.

    Raises:
        ForeseenError: they cannot.
    """
    n = len(gram)
    first, last = max(rank - n // 8, 0), min(rank + n // 8, n)
    found = eigenvalues_at(gram, (first, rank, last), NEARLY_FLAT)
    if found is None:
        return
    above, wanted, below = found
    spacing = (above - below) / max(last - first, 1)
    if wanted < FLOAT32_FLOOR or spacing < SPACING * min(1.0, EXACT_TOLERANCE / tolerance):
        raise ForeseenError(
            f"gram-float32: eigenvalues at the cut are {wanted:.0e} of the largest, and {spacing:.0e} of it apart"
        )


def _window(n: int, rank: int) -> int:
    return min(max(WINDOW, n // 32), rank, n - rank)


def _block(values: Tensor, cut: int) -> slice:
    """Return the eigenvectors to resolve: low ones, or those with eigenvalues near that at the cut."""
    n = len(values)
    if not 0 < cut < n:
        return slice(0, 0)
    if values[cut] < LOW * values[-1]:
        return _low(values, float(values[cut]))
    window = _window(n, n - cut)
    first = int((values < (1 - NEAR) * values[cut - 1]).sum())
    last = int((values <= (1 + NEAR) * values[cut]).sum())
    return slice(min(first, cut - window), max(last, cut + window))


def _low(values: Tensor, smallest: float) -> slice:
    """Return the eigenvectors that rounding mixes with each other.

    Solved among themselves, the largest of them sets the rounding errors: it must not be larger than the geometric mean
    of the largest of all and the smallest wanted one.
    """
    largest = float(values[-1])
    return slice(0, int((values <= max(smallest / largest, 2.0**-53) ** 0.5 * largest).sum()))


def _orthogonal_to(V: Tensor, others: Tensor) -> Tensor:
    """Return the other eigenvectors, nearly orthonormal, as orthonormal ones that are orthogonal to V."""
    return cholesky_whitened(others - V @ (V.mT @ others)) if others.shape[1] else others


def _resolve(matrix: TallMatrix, near: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvectors and eigenvalues, rising, of ``D^T D`` in the span of `near`, orthonormal, from its image."""
    inner, rotation = eigh(matrix.image_gram(near))
    return near @ rotation, inner.clamp_(min=0)


def _unresolved(
    matrix: TallMatrix, V: Tensor, others: Tensor, values: Tensor, resolved: slice, *, by_size: bool = False
) -> tuple[float, float]:
    """Estimate the mixing of leading with other eigenvectors, without pairs inside `resolved`.

    These pairs have the backward error of an SVD and, to second order, that of the mixing of their span with the rest.

    Args:
        matrix: D.
        V: leading eigenvectors, by rising eigenvalue.
        others: those of the next smaller eigenvalues, or of all smaller ones.
        values: all eigenvalues.
        resolved: places of the eigenvalues whose eigenvectors were solved among themselves.
        by_size: whether to measure eigenvectors of eigenvalues of different size apart. That costs more, but rounding
            errors of the largest do not count as if they were close to the cut.

    Returns:
        The sine (Frobenius norm) of the other pairs, and the addition to the backward error, relative to the largest
        singular value.
    """
    n, cut = len(values), len(values) - V.shape[1]
    unknown = cut - others.shape[1]
    first, last = (resolved.start, resolved.stop) if resolved.start < cut < resolved.stop else (cut, cut)
    far, near = others[:, : first - unknown], others[:, first - unknown :]
    total = 0.0
    if cut < n and far.shape[1] + unknown:
        for group in _groups(values, cut, by_size):
            residual = _residual(matrix, V, V[:, group.start - cut : group.stop - cut])
            total += _mixing(residual, far, values[group.start] - values[unknown:first])
            if unknown:  # their eigenvalues are at least as far away as the largest of them
                residual -= others @ (others.mT @ residual)
                total += float((residual / (values[group.start] - values[unknown - 1])).square().sum())
    if last < n and near.shape[1]:
        for group in _groups(values, last, by_size):
            residual = _residual(matrix, V, V[:, group.start - cut : group.stop - cut])
            total += _mixing(residual, near, values[group.start] - values[first:cut])
    error = MEASURED * (total / PROBES) ** 0.5
    spread = error**2 * float((values[-1] / values[cut : cut + 1]).sqrt().sum()) if first < last else 0.0
    return error, spread


def _groups(values: Tensor, first: int, by_size: bool) -> list[slice]:
    """Return the places of eigenvalues from `first` on; by size, those of a group differ by less than `GROUP`."""
    n, bounds = len(values), [first]
    while by_size and bounds[-1] < n:
        # The first group is narrow: its gaps count from the cut, those of the others are like their eigenvalues.
        below = values < values[bounds[-1]] * (GROUP if len(bounds) > 1 else NARROW)
        bounds.append(max(int(below.sum()), bounds[-1] + 1))
    edges = [*bounds, n] if bounds[-1] < n else bounds
    return [slice(*pair) for pair in pairwise(edges)]


def _residual(matrix: TallMatrix, V: Tensor, chosen: Tensor) -> Tensor:
    """Return the part outside of `V` of the images under ``D^T D`` of random vectors in `chosen`, columns of `V`."""
    image = matrix.normal_times(chosen @ gaussian(chosen.shape[1], PROBES, V.device))
    return image - V @ (V.mT @ image)


def _mixing(residual: Tensor, others: Tensor, gaps: Tensor) -> float:
    """Estimate the sum of ``norm(X)^2`` over the random vectors to first order.

    The estimate is rather too large, because it takes the gap of the smallest wanted eigenvalue for every pair.
    """
    # Entries may be as small as the rounding error of the largest one. The block is thin, so all of it is in float64.
    return float(((others.double().mT @ residual) / gaps[:, None]).square().sum())


def _shift(matrix: TallMatrix, near: Tensor, values: Tensor, far: Tensor, beyond: Tensor, across: Tensor) -> float:
    """Return how far the mixing of eigenvectors moves the eigenvalues next to the cut away from it.

    Mixing on one side of the cut leaves the subspace as it is, but its square moves eigenvalues and may open a false
    gap. Eigenvalues far from the cut count less.

    Args:
        matrix: D.
        near: (n, w) directions next to the cut.
        values: (w,) their eigenvalues.
        far: (n, j) all others on the same side.
        beyond: (j,) their eigenvalues.
        across: the first eigenvalue on the other side.
    """
    if far.shape[1] == 0:
        return 0.0
    residual = matrix.normal_times(near) - near * values
    gaps = (beyond[:, None] - values[None, :]).abs().clamp(min=torch.finfo(values.dtype).tiny)
    moved = ((far.mT @ residual).square() / gaps).sum(0)
    distance = (values - across).abs().clamp(min=2.0**-52 * float(across))
    return float((moved / distance).amax() * distance.amin())


def _corrected(matrix: TallMatrix, V: Tensor, others: Tensor, values: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Return the basis after one first-order correction, and its Rayleigh quotients, rising.

    The columns need not be orthonormal beyond float32: that adds an error of second order.

    Raises:
        ConvergenceError: the correction is not small.
    """
    cut = others.shape[1]
    image = matrix.normal_times(V)
    diagonal = (V * image).sum(0) / V.square().sum(0)
    residual = (image - V * diagonal).to(others.dtype)  # small, so float32 is accurate enough
    gaps = (diagonal[None, :] - values[:cut, None]).to(others.dtype)
    X = (others.mT @ residual) / gaps
    X[cut - window :, :window] = 0  # these pairs are solved exactly afterwards
    moved = float(torch.linalg.vector_norm(X))
    if not moved <= CORRECTABLE:
        raise ConvergenceError(f"gram-float32: off by {moved:.0e}, too much for a first-order correction")
    return cholesky_whitened(V + (others @ X).double()), diagonal
