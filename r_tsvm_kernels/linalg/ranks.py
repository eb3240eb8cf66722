"""Rules that choose how many singular directions of each task survive."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from ..errors import ConfigError

RankRule = Literal["sparsity", "fixed", "energy", "noise"]

# A number, or a function of the singular values: (min(m, n),) float64, falling, in any unit.
Rank = int | Callable[[Tensor], int]


def rank_share(shape: tuple[int, int], tasks: int) -> float:
    """Return the real-valued share of ``min(m, n)`` that falls to each of `tasks` tasks.

    Written as a product with 1 / tasks, as in the published code of TSV-Merge, so that rounding it down gives the same
    rank for every size: ``min(m, n) // T``, but one less where the product falls just short (T = 49, r = 49).
    """
    return min(shape) * (1 / tasks)


def fixed_rank(shape: tuple[int, int], tasks: int) -> int:
    """Return TSV-Merge's uniform rank, the share rounded down (Gargiulo et al., CVPR 2025)."""
    return int(rank_share(shape, tasks))


def sparsity_rank(shape: tuple[int, int], tasks: int, sparsity: float, rho: float) -> int:
    """Return ``max(1, floor(r / T * (1 - z)^rho))``: the sparser the task matrix, the fewer directions it gets.

    Our reconstruction of the sparsity-adaptive rank selection of R-TSVM (arXiv 2502.06876); rho = 0 is `fixed_rank`.
    """
    return max(1, int(rank_share(shape, tasks) * (1.0 - sparsity) ** rho))


def energy_rank(singular_values: Tensor, energy: float) -> int:
    """Return the smallest rank whose squared singular values hold the fraction `energy` of their sum, at least 1.

    Args:
        singular_values: (r,), descending, in any unit.
        energy: fraction in (0, 1].
    """
    cumulative = singular_values.square().cumsum(0)
    return int((cumulative < energy * cumulative[-1:]).sum()) + 1


def noise_rank(singular_values: Tensor, shape: tuple[int, int]) -> int:
    """Count the singular values above the noise edge of Gavish and Donoho, at least 1.

    The optimal hard threshold for unknown noise, ``omega(beta) * median(s)`` with ``omega(beta) = 0.56 beta^3 -
    0.95 beta^2 + 1.82 beta + 1.43`` and beta the short over the long side (IEEE Trans. Inf. Theory 60(8), 2014, eq. 5).

    Args:
        singular_values: (r,), descending, in any unit.
        shape: (m, n) of the matrix they belong to.
    """
    beta = min(shape) / max(shape)
    omega = 0.56 * beta**3 - 0.95 * beta**2 + 1.82 * beta + 1.43
    return max(1, int((singular_values > omega * singular_values.median()).sum()))


def choose_rank(
    rule: RankRule | int,
    shape: tuple[int, int],
    tasks: int,
    *,
    sparsity: float = 0.0,
    rho: float = 1.0,
    energy: float = 0.95,
) -> Rank:
    """Return the rank of one task matrix under `rule`, never above ``max(1, floor(r / T))``.

    The cap keeps the sum over the tasks at or below ``r = min(m, n)``, which two orthonormal bases of that many
    columns need. The numerical rank is respected later, by the solver.

    Args:
        rule: ``sparsity``, ``fixed``, ``energy``, ``noise``, or the rank itself.
        shape: (m, n) of the task matrix.
        tasks: T, the number of tasks that share the matrix.
        sparsity: z in [0, 1], for the rule ``sparsity``.
        rho: exponent of the rule ``sparsity``.
        energy: fraction in (0, 1] for the rule ``energy``.

    Returns:
        A number; for ``energy`` and ``noise`` a function of the singular values, which the solver calls when it has
        them.

    Raises:
        ConfigError: an unknown rule or a rank below 1.
    """
    cap = max(1, fixed_rank(shape, tasks))
    if isinstance(rule, int):
        if rule < 1:
            raise ConfigError(f"rank must be at least 1, got {rule}")
        return min(rule, cap)
    if rule == "sparsity":
        return min(sparsity_rank(shape, tasks, sparsity, rho), cap)
    if rule == "fixed":
        return fixed_rank(shape, tasks)
    if rule == "energy":
        return lambda singular_values: min(energy_rank(singular_values, energy), cap)
    if rule == "noise":
        return lambda singular_values: min(noise_rank(singular_values, shape), cap)
    raise ConfigError(f"rank must be sparsity, fixed, energy, noise or a whole number, got {rule!r}")
