"""Rules that choose how many singular directions of each task are kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

from ..errors import ConfigError

RankRule = Literal["sparsity", "sparsity_power", "shared", "fixed", "full", "energy", "noise"]

# A whole number, or a function of the singular values: (min(m, n),) float64, falling, in any unit.
Rank = int | Callable[[Tensor], int]


def rank_share(shape: tuple[int, int], tasks: int) -> float:
    """Return ``min(m, n) * (1 / T)``, the real-valued share of each of T tasks.

    The published code of TSV-Merge multiplies by 1 / T, too: rounded down, the share is the same rank at every size.
    That is ``min(m, n) // T``, or one less if the rounded product is just below a whole number (T = 49, r = 49).
    """
    return min(shape) * (1 / tasks)


def fixed_rank(shape: tuple[int, int], tasks: int) -> int:
    """Return TSV-Merge's uniform rank, ``floor(min(m, n) / T)`` (Gargiulo et al., CVPR 2025).

    Args:
        shape: (m, n) of the task matrix.
        tasks: T.

    Examples:
        >>> fixed_rank((512, 128), 3)
        42
    """
    return int(rank_share(shape, tasks))


def sparsity_rank(shape: tuple[int, int], tasks: int, sparsity: float, rho: float) -> int:
    """Return ``max(1, floor(r / T * (1 - z)^rho))``, at most r: for rho > 0, a sparser matrix gets fewer directions.

    Our reconstruction of the sparsity-adaptive rank selection of R-TSVM (arXiv 2502.06876); rho = 0 is `fixed_rank`.

    Args:
        shape: (m, n) of the task matrix, r = min(m, n).
        tasks: T.
        sparsity: z in [0, 1], fraction of small elements.
        rho: exponent. If it is negative, a sparser matrix gets more directions.

    Examples:
        >>> sparsity_rank((512, 128), 3, 0.5, 1.0)
        21
    """
    try:
        wanted = rank_share(shape, tasks) * _dense(shape, sparsity, rho) ** rho
    except OverflowError:
        wanted = math.inf
    return max(1, int(min(min(shape), wanted)))


def sparsity_power_rank(shape: tuple[int, int], tasks: int, sparsity: float, gamma: float) -> int:
    """Return ``max(1, floor(r / T * (1 - z^gamma)))``: another reading of R-TSVM, with the power on the sparsity.

    Args:
        shape: (m, n) of the task matrix, r = min(m, n).
        tasks: T.
        sparsity: z in [0, 1], fraction of small elements.
        gamma: exponent, >= 0.

    Examples:
        >>> sparsity_power_rank((512, 128), 3, 0.5, 2.0)
        32
    """
    return max(1, int(rank_share(shape, tasks) * (1.0 - sparsity**gamma)))


def shared_ranks(shape: tuple[int, int], sparsities: Sequence[float], rho: float) -> list[int]:
    """Return ranks in proportion to ``(1 - z_t)^rho``, at least 1 each, whose sum is r: another reading of R-TSVM.

    A share ``r (1 - z_t)^rho / sum_s (1 - z_s)^rho`` is rounded down, to no less than 1. What is left goes to the
    largest remainders, to the earlier task among equals; what is too much is taken from the largest ranks.

    Args:
        shape: (m, n) of the task matrices, r = min(m, n).
        sparsities: z_t in [0, 1] of each of the T tasks.
        rho: exponent, of either sign.

    Raises:
        ConfigError: there are more tasks than rows or columns.

    Examples:
        >>> shared_ranks((512, 128), [0.5, 0.0, 0.5], 1.0)
        [32, 64, 32]
    """
    tasks, short = len(sparsities), min(shape)
    if tasks > short:
        raise ConfigError(f"{tasks} tasks cannot share {short} directions; each needs one")
    dense = [_dense(shape, sparsity, rho) for sparsity in sparsities]
    largest = max(dense) if rho >= 0 else min(dense)  # power, so that none overflows; 0 if all are 0
    powers = [(part / largest) ** rho if largest > 0 else 1.0 for part in dense]
    shares = [short * power / sum(powers) for power in powers]
    ranks = [max(1, int(share)) for share in shares]
    while sum(ranks) < short:
        ranks[max(range(tasks), key=lambda task: shares[task] - ranks[task])] += 1
    while sum(ranks) > short:
        ranks[max(range(tasks), key=lambda task: ranks[task])] -= 1
    return ranks


def _dense(shape: tuple[int, int], sparsity: float, rho: float) -> float:
    """Return ``1 - z``; for rho < 0, at least one element counts as not small, so that the power is finite."""
    return max(1.0 - sparsity, 1 / (shape[0] * shape[1])) if rho < 0 else 1.0 - sparsity


def energy_rank(singular_values: Tensor, energy: float) -> int:
    """Return the smallest rank whose squared singular values hold the fraction `energy` of their sum, at least 1.

    Args:
        singular_values: (r,), falling, in any unit.
        energy: fraction in (0, 1].

    Examples:
        >>> energy_rank(torch.tensor([3.0, 2.0, 1.0]), 0.9)  # (9 + 4) / 14 = 0.93
        2
    """
    cumulative = singular_values.square().cumsum(0)
    return int((cumulative < energy * cumulative[-1:]).sum()) + 1


def noise_rank(singular_values: Tensor, shape: tuple[int, int]) -> int:
    """Count the singular values above the noise edge of Gavish and Donoho, at least 1.

    The optimal hard threshold for unknown noise, ``omega(beta) * median(s)`` with ``omega(beta) = 0.56 beta^3 -
    0.95 beta^2 + 1.82 beta + 1.43`` and beta the short over the long side (IEEE Trans. Inf. Theory 60(8), 2014, eq. 5).

    Args:
        singular_values: (r,), falling, in any unit.
        shape: (m, n) of their matrix.

    Examples:
        >>> noise_rank(torch.tensor([9.0, 1.0, 1.0, 1.0]), (4, 4))
        1
    """
    beta = min(shape) / max(shape)
    omega = 0.56 * beta**3 - 0.95 * beta**2 + 1.82 * beta + 1.43
    return max(1, int((singular_values > omega * singular_values.median()).sum()))


class LimitedRule:
    """A rank rule whose result is at most `limit`.

    Attributes:
        asked: rank that the rule gave when it was last called, before the limit; 0 if it was not called.
    """

    def __init__(self, rule: Callable[[Tensor], int], limit: int) -> None:
        self.rule, self.limit, self.asked = rule, limit, 0

    def __call__(self, singular_values: Tensor) -> int:
        """Return the rank for these singular values, (r,) and falling."""
        self.asked = self.rule(singular_values)
        return min(self.asked, self.limit)


def asked_rank(
    rule: RankRule | float,
    shape: tuple[int, int],
    tasks: int,
    *,
    sparsity: float = 0.0,
    rho: float = 1.0,
    energy: float = 0.95,
) -> Rank:
    """Return the rank of one task matrix under `rule`, as `choose_rank` does, but without its limit.

    Raises:
        ConfigError: an unknown rule, a rank that is not positive, or ``shared``, which needs all tasks; see
            `shared_ranks`.

    Examples:
        >>> asked_rank(100, (512, 128), 3), asked_rank(0.5, (512, 128), 3)
        (100, 64)
    """
    if isinstance(rule, int | float):
        if 0 < rule < 1:
            return max(1, math.floor(Fraction(repr(float(rule))) * min(shape)))
        if not 1 <= rule < math.inf or rule != int(rule):
            raise ConfigError(f"rank must be a whole number from 1, or a fraction below 1, got {rule}")
        return int(rule)
    if rule == "sparsity":
        return sparsity_rank(shape, tasks, sparsity, rho)
    if rule == "sparsity_power":
        return sparsity_power_rank(shape, tasks, sparsity, rho)
    if rule == "fixed":
        return fixed_rank(shape, tasks)
    if rule == "full":
        return min(shape)
    if rule == "energy":
        return lambda singular_values: energy_rank(singular_values, energy)
    if rule == "noise":
        return lambda singular_values: noise_rank(singular_values, shape)
    raise ConfigError(
        f"rank must be sparsity, sparsity_power, fixed, full, energy, noise or a positive number, got {rule!r}"
    )


def limited(rank: Rank, limit: int) -> int | LimitedRule:
    """Return a rank that is at most `limit`; rules become `LimitedRule`."""
    return min(rank, limit) if isinstance(rank, int) else LimitedRule(rank, limit)


def rank_limit(shape: tuple[int, int], tasks: int) -> int:
    """Return ``max(1, floor(r / T))``: the ranks of T tasks up to this one sum to r = min(m, n) or less.

    Examples:
        >>> rank_limit((512, 128), 3)
        42
    """
    return max(1, fixed_rank(shape, tasks))


def choose_rank(
    rule: RankRule | float,
    shape: tuple[int, int],
    tasks: int,
    *,
    sparsity: float = 0.0,
    rho: float = 1.0,
    energy: float = 0.95,
) -> Rank:
    """Return the rank of one task matrix under `rule`, never above `rank_limit`, ``max(1, floor(r / T))``.

    The limit keeps the sum over the tasks at or below ``r = min(m, n)``: the two concatenated bases have that many
    columns at most. The solver clips the rank to the numerical rank later.

    Args:
        rule: ``sparsity``, ``sparsity_power``, ``fixed``, ``energy``, ``noise``, the rank itself, or a number below 1,
            which is a fraction of r.
        shape: (m, n) of the task matrix.
        tasks: T, the number of tasks that share the matrix.
        sparsity: z in [0, 1], for ``sparsity`` and ``sparsity_power``.
        rho: exponent of these two rules.
        energy: fraction in (0, 1] for the rule ``energy``.

    Returns:
        A number; for ``energy`` and ``noise`` a function of the singular values, which the solver calls.

    Raises:
        ConfigError: as `asked_rank`.

    Examples:
        >>> choose_rank("sparsity", (512, 128), 3, sparsity=0.5), choose_rank(100, (512, 128), 3)
        (21, 42)
    """
    rank = asked_rank(rule, shape, tasks, sparsity=sparsity, rho=rho, energy=energy)
    return limited(rank, rank_limit(shape, tasks))


def pad_for_rule(rank: Rank, count: int) -> Rank:
    """Pad the singular values that a rank rule sees with the zeros of the rows and columns that were left out."""
    if isinstance(rank, int):
        return rank
    return lambda values: rank(torch.cat([values, values.new_zeros(count - len(values))]))
