"""Spectral merges in numpy, float64, from the formulas.

Each takes the SVD that it uses: differences between several SVDs show the limits of float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from r_tsvm_kernels.linalg import Rank, long_side_is_whole
from tests.oracle import merge_triplets as tsv_merge
from tests.oracle import polar, thin_svd
from tests.oracle import weighted_merge as weighted_triplets

EPS = 2.0**-53
# Norm of what `blurred` adds, in units of eps times the norm of the matrix.
BLUR = 30


class Triplets(NamedTuple):
    """Thin SVD: U (m, r), values (r,), Vh (r, n)."""

    U: np.ndarray
    S: np.ndarray
    Vh: np.ndarray


Svd = Callable[[np.ndarray], Triplets]


def plain(matrix: np.ndarray) -> Triplets:
    """The SVD of the matrix."""
    return Triplets(*thin_svd(matrix))


def flipped(matrix: np.ndarray) -> Triplets:
    """The SVD of the matrix with rows and columns reversed and exchanged: other roundings, the same triplets."""
    U, S, Vh = thin_svd(matrix[::-1, ::-1].T)
    return Triplets(Vh.T[::-1], S, U.T[:, ::-1])


def blurred(matrix: np.ndarray) -> Triplets:
    """The SVD of the matrix after its last bits were changed: no certificate may depend on the difference."""
    noise = np.random.default_rng(0).standard_normal(matrix.shape)
    return plain(matrix + BLUR * EPS * np.linalg.norm(matrix) / max(sum(matrix.shape), 1) ** 0.5 * noise)


def numerical_rank(values: np.ndarray, norm: float, single: bool) -> int:
    """Singular values above rounding of the matrix's dtype (float32 or float64)."""
    return int((values > max(np.finfo(np.float32).eps if single else 0.0, 2.0**-46) * norm).sum())


def leading(matrix: np.ndarray, rank: Rank, single: bool, svd: Svd) -> Triplets:
    """Leading triplets, `rank` of them or as many as the matrix has."""
    U, S, Vh = svd(matrix)
    wanted = rank(torch.from_numpy(S.copy())) if callable(rank) else rank
    k = min(wanted, numerical_rank(S, float(np.linalg.norm(matrix)), single))
    return Triplets(U[:, :k], S[:k], Vh[:k])


def of_basis(matrix: np.ndarray, V: np.ndarray, backwards: bool) -> Triplets:
    """Triplets of a matrix in given right directions (n, k), as a solver computes them from its choice of directions.

    `backwards` sums in the other direction: the same up to rounding errors.
    """
    Q, R = np.linalg.qr(matrix[:, ::-1].copy() @ V[::-1].copy() if backwards else matrix @ V)
    P, S, Wh = np.linalg.svd(R)
    return Triplets(Q @ P, S, Wh @ V.T)


def iso_c(deltas: Sequence[np.ndarray], weights: Sequence[float], svd: Svd) -> np.ndarray:
    """Marczak et al., algorithm 1."""
    total = sum(weight * delta for weight, delta in zip(weights, deltas, strict=True))
    return np.linalg.svd(total, compute_uv=False).mean() * polar(total, svd)


def iso_cts(deltas: Sequence[np.ndarray], weights: Sequence[float], fraction: float, svd: Svd) -> np.ndarray:
    """Marczak et al., algorithm 2."""
    deltas = [weight * delta for weight, delta in zip(weights, deltas, strict=True)]
    total, short, tasks = sum(deltas), min(deltas[0].shape), len(deltas)
    own = min(round((short - int(short * fraction)) / tasks), short // tasks)

    def triplets(matrix: np.ndarray, rank: int, norm: float) -> Triplets:
        U, S, Vh = svd(matrix)
        k = min(rank, int((np.finfo(np.float32).eps * norm < S).sum()))
        return Triplets(U[:, :k], S[:k], Vh[:k])

    parts = [triplets(total, short - own * tasks, float(np.linalg.norm(total)))]
    for delta in deltas:
        rest = delta - parts[0].U @ (parts[0].U.T @ delta)
        parts.append(triplets(rest, own, float(np.linalg.norm(delta))))
    left, right = np.hstack([part.U for part in parts]), np.vstack([part.Vh for part in parts])
    return sum(part.S.sum() for part in parts) / short * polar(left, svd) @ polar(right, svd)


def star(deltas: Sequence[np.ndarray], weights: Sequence[float], eta: float, single: bool, svd: Svd) -> np.ndarray:
    """Lee et al., section 3."""
    total = np.zeros_like(deltas[0])
    for weight, delta in zip(weights, deltas, strict=True):
        U, S, Vh = svd(delta)
        if S.any():
            k = int((np.cumsum(S) < eta / 100 * S.sum()).sum()) + 1
            k = min(k, numerical_rank(S, float(np.linalg.norm(delta)), single))
            total += weight * S.sum() / S[:k].sum() * (U[:, :k] * S[:k]) @ Vh[:k]
    return total / len(deltas)


def subspace_boosting(deltas: Sequence[np.ndarray], weights: Sequence[float], beta: float, svd: Svd) -> np.ndarray:
    """Skorobogat et al.: the first value that reaches the share of the sum is the least."""
    U, S, Vh = svd(sum(weight * delta for weight, delta in zip(weights, deltas, strict=True)))
    if not S.any():
        return np.zeros_like(deltas[0])
    index = min(int((np.cumsum(S) < beta * S.sum()).sum()), len(S) - 1)
    k = int((1e-6 * S[0] < S).sum())
    return (U[:, :k] * np.maximum(S, S[index])[:k]) @ Vh[:k]


def core_space(deltas: Sequence[np.ndarray], weights: Sequence[float], single: bool, svd: Svd) -> np.ndarray:
    """Panariello et al., section 3, with TSV-Merge of the cores: that of the task matrices at the rank of the cores."""
    touched = np.any([delta != 0 for delta in deltas], axis=0)
    m, n = int(touched.any(1).sum()), int(touched.any(0).sum())
    ranks = [numerical_rank(svd(delta).S, float(np.linalg.norm(delta)), single) for delta in deltas]
    kept = [index for index, rank in enumerate(ranks) if rank]
    if not kept:
        return np.zeros_like(deltas[0])
    rank = int(min(sum(ranks), m, n) * (1 / len(kept)))
    parts = [leading(deltas[index], min(rank, ranks[index]), single, svd) for index in kept]
    return tsv_merge(parts, [weights[index] for index in kept], svd)


def weighted_merge(
    tasks: Sequence[np.ndarray],
    weights: Sequence[float],
    power: float,
    ranks: Sequence[int] | None,
    single: bool,
    svd: Svd,
) -> np.ndarray:
    """Merge by weighted orthogonalisation; tasks, rows and columns of zeros take no part."""
    merged, support = np.zeros_like(tasks[0]), np.any([task != 0 for task in tasks], axis=0)
    rows, columns = support.any(1), support.any(0)
    live = [index for index, task in enumerate(tasks) if task.any()]
    if not live:
        return merged
    parts = [tasks[index][np.ix_(rows, columns)] for index in live]
    own, shape = [weights[index] for index in live], parts[0].shape
    if len(live) == 1 and ranks is None:
        update = own[0] * parts[0]
    else:
        lead = None if long_side_is_whole(shape, len(live)) else -(-min(shape) // len(live))
        eps = np.finfo(np.float32).eps if single else 2.0**-46
        update = weighted_triplets(parts, own, power, ranks and [ranks[index] for index in live], lead, svd, eps)
    merged[np.ix_(rows, columns)] = update
    return merged
