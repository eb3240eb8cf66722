"""Spectral merges as they are published: by full SVDs. Slow, plain, and exact in float64.

Written from the papers. Our solvers are timed against them in float32, and checked against them in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ..methods.iso_cts import common_and_own_ranks

# Singular values up to this share of the largest count as zero: the polar factor is a partial isometry there.
RANK_TOLERANCE = 1e-6
COMMON_SPACE = 0.8  # of Iso-CTS: share of the rank that is for the sum of the tasks


def tsv_merge(
    matrices: Sequence[Tensor],
    ranks: Sequence[int],
    weights: Sequence[float] | None = None,
    driver: str | None = None,
    *,
    zero: float = 0.0,
    orthogonalize: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Merge task matrices by T + 2 SVDs in their dtype and on their device.

    TSV-Merge (Gargiulo et al., "Task Singular Vectors", CVPR 2025, algorithm 1): concatenate the leading singular
    triplets of all tasks, and replace both concatenated bases by their polar factors.

    Args:
        matrices: T matrices (m, n).
        ranks: of each task.
        weights: of each task; None means 1.
        driver: of torch's SVD on a GPU, see `svd`.
        zero: singular values up to this share of a matrix's Frobenius norm count as zero.
        orthogonalize: replaces the polar factor.
    """
    left, core, right = bases(matrices, ranks, weights, driver, zero=zero)
    both = orthogonalize or (lambda basis: polar(basis, driver))
    merged: Tensor = (both(left) * core) @ both(right)
    return merged


def bases(
    matrices: Sequence[Tensor],
    ranks: Sequence[int],
    weights: Sequence[float] | None = None,
    driver: str | None = None,
    *,
    zero: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the concatenated bases (m, k) and (k, n) of `tsv_merge`, and the weighted singular values (k,) between."""
    left, core, right = [], [], []
    factors = weights or [1.0] * len(matrices)
    for matrix, rank, factor in zip(matrices, ranks, factors, strict=True):
        U, s, Vh = svd(matrix, driver)
        kept = min(rank, int((s > zero * s.norm()).sum())) if zero else rank
        left.append(U[:, :kept])
        core.append(factor * s[:kept])
        right.append(Vh[:kept])
    return torch.cat(left, 1), torch.cat(core), torch.cat(right)


def polar(matrix: Tensor, driver: str | None = None) -> Tensor:
    """Return the canonical polar factor by an SVD."""
    P, s, Qh = svd(matrix, driver)
    kept = int((s > RANK_TOLERANCE * s[:1]).sum())
    factor: Tensor = P[:, :kept] @ Qh[:kept]
    return factor


def truncated(matrix: Tensor, rank: int) -> Tensor:
    """Return the best approximation of a rank by an SVD."""
    U, s, Vh = svd(matrix)
    nearest: Tensor = (U[:, :rank] * s[:rank]) @ Vh[:rank]
    return nearest


def iso_c(deltas: Sequence[Tensor]) -> Tensor:
    """Return the update of Iso-C (Marczak et al., ICML 2025): the sum with its singular values made equal."""
    U, s, Vh = svd(torch.stack(list(deltas)).sum(0))
    update: Tensor = s.mean() * (U @ Vh)
    return update


def subspace_boosting(deltas: Sequence[Tensor], share: float = 0.01) -> Tensor:
    """Raise the small singular values of the sum: Skorobogat et al., arXiv 2506.16506."""
    U, S, Vh = svd(torch.stack(list(deltas)).sum(0))
    first = int((S.cumsum(0) < share * S.sum()).sum())
    return (U * S.clamp(min=S[first])) @ Vh


def iso_cts(deltas: Sequence[Tensor]) -> Tensor:
    """Return the update of Iso-CTS (Marczak et al., ICML 2025, algorithm 2): common and task-specific subspaces."""
    total = torch.stack(list(deltas)).sum(0)
    common_rank, own_rank = common_and_own_ranks(min(total.shape), len(deltas), COMMON_SPACE)
    U, s, Vh = svd(total)
    left, core, right = [U[:, :common_rank]], [s[:common_rank]], [Vh[:common_rank]]
    for delta in deltas:
        U, s, Vh = svd(delta - left[0] @ (left[0].mT @ delta))
        left.append(U[:, :own_rank])
        core.append(s[:own_rank])
        right.append(Vh[:own_rank])
    return torch.cat(core).mean() * (polar(torch.cat(left, 1)) @ polar(torch.cat(right)))


def star(deltas: Sequence[Tensor], eta: float = 40.0) -> Tensor:
    """Return the update of STAR (Lee et al., NAACL 2025): leading singular triplets, their nuclear norm restored."""
    cuts = []
    for delta in deltas:
        U, s, Vh = svd(delta)
        k = int((s.cumsum(0) < eta / 100 * s.sum()).sum()) + 1
        cuts.append((U[:, :k] * s[:k]) @ Vh[:k] * (s.sum() / s[:k].sum()))
    return torch.stack(cuts).mean(0)


def knots(deltas: Sequence[Tensor]) -> Tensor:
    """Return the update of KnOTS-TIES (Stoica et al., ICLR 2025) at density 1: the parts ``S V_t`` by TIES."""
    U, s, Vh = svd(torch.cat(list(deltas), 1))
    parts = torch.stack((s[:, None] * Vh).chunk(len(deltas), 1))
    agree = parts.sign() == parts.sum(0).sign()
    merged: Tensor = U @ ((parts * agree).sum(0) / agree.sum(0).clamp(min=1))
    return merged


class _ByValue:
    """A matrix as the key of a cache."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self._hash = hash((matrix.shape, matrix.device, float(matrix.sum())))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ByValue) and torch.equal(self.matrix, other.matrix)


def svd(matrix: Tensor, driver: str | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return U, s, Vh of the reduced SVD, s falling; in float64 on a GPU, where it takes minutes, by `eigh`.

    `driver` is torch's, for a GPU: ``gesvd`` (QR), ``gesvdj`` (Jacobi); None leaves the choice to torch.
    Float64 results are truths, which are not timed. Several benchmarks need the same ones, so the last few are cached.
    """
    return exact_svd(_ByValue(matrix)) if matrix.dtype == torch.float64 else _reduced(matrix, driver)


@lru_cache(maxsize=10)
def exact_svd(key: _ByValue) -> tuple[Tensor, Tensor, Tensor]:
    """Return the SVD of a float64 matrix."""
    return svd_by_eigh(key.matrix) if key.matrix.device.type == "cuda" else _reduced(key.matrix)


def _reduced(matrix: Tensor, driver: str | None = None) -> tuple[Tensor, Tensor, Tensor]:
    U, s, Vh = torch.linalg.svd(matrix, full_matrices=False, driver=driver)
    return U, s, Vh


def svd_by_eigh(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the reduced SVD of a float64 matrix by the eigenvectors of the Gram matrix of its short side.

    Good to 1e-8 where singular values are within 1e4 of each other: enough for checks to 1e-4.
    """
    if matrix.shape[0] < matrix.shape[1]:
        U, s, Vh = svd_by_eigh(matrix.mT)
        return Vh.mT, s, U.mT
    values, V = torch.linalg.eigh(matrix.mT @ matrix)
    s, V = values.clamp(min=0).sqrt().flip(0), V.flip(1)
    return (matrix @ V) / s.clamp(min=torch.finfo(s.dtype).tiny), s, V.mT
