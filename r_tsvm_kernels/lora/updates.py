"""Low-rank updates from singular triplets, or cut to a smaller rank; no dense matrix is formed."""

from __future__ import annotations

from torch import Tensor

from ..errors import ConfigError
from ..linalg import Factored, Rank, choose_rank, leading_triplets


def from_triplets(U: Tensor, values: Tensor, Vh: Tensor) -> Factored:
    """Return ``U @ diag(values) @ Vh`` with the square roots of the singular values in both factors.

    Rounding then has the same effect on both.

    Args:
        U: (m, k).
        values: (k,), not negative.
        Vh: (k, n).

    Returns:
        Factors (m, k) and (k, n).

    Examples:
        >>> from_triplets(torch.ones(2, 1), torch.tensor([4.0]), torch.ones(1, 2)).left
        tensor([[2.],
                [2.]])
    """
    roots = values.sqrt()
    return Factored(U * roots, roots[:, None] * Vh)


def truncated(matrix: Factored, rank: Rank) -> tuple[Factored, float]:
    """Return the best approximation of a rank, computed in float64 by QR and a small SVD.

    Args:
        matrix: the update.
        rank: a number, or a rule that takes the singular values.

    Returns:
        The approximation, and its share of the squared Frobenius norm.

    Raises:
        ConvergenceError: the SVD failed.
    """
    found = leading_triplets(matrix, rank)
    return from_triplets(found.U, found.S, found.Vh), found.captured_energy


def rank_of(shape: tuple[int, int], rank: int | None, energy: float | None = None, noise: bool = False) -> Rank:
    """Return the rank of an update: a number, a rule, or a rule that a number limits.

    Args:
        shape: shape of the update.
        rank: the number; None means no limit.
        energy: take the smallest rank that retains this share of the squared Frobenius norm.
        noise: take the number of singular values above the noise edge (`noise_rank`).

    Returns:
        A number, or a function of the singular values.

    Raises:
        ConfigError: a number is out of range, or both rules are given.

    Examples:
        >>> rank_of((64, 32), 128)
        32
    """
    if energy is not None and noise:
        raise ConfigError("the rank follows either energy or noise, not both")
    if energy is not None and not 0.0 < energy <= 1.0:
        raise ConfigError(f"energy must be above 0 and at most 1, got {energy}")
    if rank is not None and rank < 1:
        raise ConfigError(f"rank must be at least 1, got {rank}")
    limit = min(shape) if rank is None else min(rank, *shape)
    if energy is None and not noise:
        return limit
    rule = choose_rank("noise" if noise else "energy", shape, 1, energy=energy or 1.0)
    assert callable(rule)
    return lambda singular_values: min(rule(singular_values), limit)
