"""Rules that choose how many singular directions of each task are kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from ..errors import ConfigError

RankRule = Literal["sparsity", "fixed", "energy", "noise"]

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
    """Return ``max(1, floor(r / T * (1 - z)^rho))``: a sparser task matrix gets fewer directions.

    Our reconstruction of the sparsity-adaptive rank selection of R-TSVM (arXiv 2502.06876); rho = 0 is `fixed_rank`.

    Args:
        shape: (m, n) of the task matrix, r = min(m, n).
        tasks: T.
        sparsity: z in [0, 1], fraction of small elements.
        rho: exponent, >= 0.

    Examples:
        >>> sparsity_rank((512, 128), 3, 0.5, 1.0)
        21
    """
    return max(1, int(rank_share(shape, tasks) * (1.0 - sparsity) ** rho))


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

    The cap keeps the sum over the tasks at or below ``r = min(m, n)``: the two concatenated bases have that many
    columns at most. The solver clips the rank to the numerical rank later.

    Args:
        rule: ``sparsity``, ``fixed``, ``energy``, ``noise``, or the rank itself.
        shape: (m, n) of the task matrix.
        tasks: T, the number of tasks that share the matrix.
        sparsity: z in [0, 1], for the rule ``sparsity``.
        rho: exponent of the rule ``sparsity``.
        energy: fraction in (0, 1] for the rule ``energy``.

    Returns:
        A number; for ``energy`` and ``noise`` a function of the singular values, which the solver calls.

    Raises:
        ConfigError: an unknown rule or a rank below 1.

    Examples:
        >>> choose_rank("sparsity", (512, 128), 3, sparsity=0.5), choose_rank(100, (512, 128), 3)
        (21, 42)
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
