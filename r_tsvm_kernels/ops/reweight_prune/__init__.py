"""Clipping of outliers and magnitude pruning of task vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from torch import Tensor

from ... import dispatch
from ...errors import ConfigError
from .._checks import check_group, numbers_of
from ..magnitude_select import kept_count
from ..task_statistics import TaskStatistics, task_statistics

OutlierClipping = Literal["clip", "none"]


@dispatch.op("Reweighting and pruning", cpu=("cpu", "torch"), cuda=("cuda", "triton", "torch"), small={"BLOCK": 128})
def reweight_prune(
    base: Tensor,
    tuned: Sequence[Tensor],
    statistics: TaskStatistics | None = None,
    *,
    outlier_weighting: OutlierClipping = "clip",
    density: Sequence[float] | float = 1.0,
    backend: str | None = None,
) -> list[Tensor]:
    """Form the task vectors ``D_t = tuned[t] - base``, clip their outliers and prune them.

    ``clip`` replaces D_t by ``sign(D_t) * min(|D_t|, theta_t)``; ``none`` leaves the elements alone. Pruning
    keeps exactly ``ceil(density_t * numel)`` elements of largest magnitude, the lowest flat index first among equals,
    and sets the rest to 0. R-TSVM prepares task matrices in this way (Yang et al., arXiv 2502.06876; the formulas are
    our reconstruction).

    Args:
        base: any shape, float64, float32, float16 or bfloat16.
        tuned: T tensors of the same shape and device; dtypes may differ.
        statistics: of these tensors, from `task_statistics`; only its `theta` is used, by ``clip``. None measures the
            tensors with the defaults of `task_statistics`.
        outlier_weighting: ``clip`` or ``none``.
        density: fraction kept, in [0, 1], one number or one per task.
        backend: run this implementation or raise; None takes the fastest one that is available.

    Returns:
        T new tensors of the inputs' shape, float32 (float64 if any input is float64), in weight units.

    Raises:
        ShapeError, DTypeError, DeviceError: the tensors do not match.
        ConfigError: an unknown mode, statistics of another number of tasks, a density out of range, or another number
            of densities than tasks.
        NonFiniteError: a task vector that must be pruned holds NaN or infinity.
        BackendUnavailableError: `backend` cannot run here.

    Examples:
        >>> import torch
        >>> tuned = torch.tensor([0.1, -0.4, 0.2, 8.0])
        >>> reweight_prune(torch.zeros(4), [tuned], outlier_weighting="none", density=0.5)
        [tensor([ 0.0000, -0.4000,  0.0000,  8.0000])]
    """
    check_group(base, tuned, op="reweight_prune")
    check_weighting(outlier_weighting, statistics, len(tuned))
    keep = kept_counts(density, len(tuned), base.numel(), op="reweight_prune")
    run = dispatch.select("reweight_prune", base, *tuned, backend=backend)
    theta = None
    if outlier_weighting == "clip":
        theta = (statistics or task_statistics(base, tuned)).theta
    result: list[Tensor] = run(base, tuned, theta, keep)
    return result


def pruned_sparsity(
    statistics: TaskStatistics,
    *,
    outlier_weighting: OutlierClipping = "clip",
    density: Sequence[float] | float = 1.0,
    eps: float = 0.1,
) -> list[float]:
    """Return for each task the share of elements of ``reweight_prune``'s result with magnitude at most ``eps * mean``.

    Reads no tensor. If the smallest kept magnitude is above the limit, the small elements are those that pruning
    dropped; otherwise they are those that were small before. So the count is the larger of the two, unless clipping
    made every element small. R-TSVM chooses ranks by these shares (arXiv 2502.06876; our reconstruction).

    Args:
        statistics: from `task_statistics` with the same `eps`.
        outlier_weighting: as for `reweight_prune`.
        density: as for `reweight_prune`.
        eps: multiple of the mean magnitude up to which an element is small.

    Returns:
        One fraction in [0, 1] per task; 1 for empty tensors.

    Raises:
        ConfigError: a density out of range, or another number of densities than tasks.

    Examples:
        >>> import torch
        >>> statistics = task_statistics(torch.zeros(4), [torch.tensor([0.0, -0.4, 0.2, 8.0])])
        >>> pruned_sparsity(statistics, density=0.25)
        [0.75]
    """
    numel = statistics.numel
    shares = []
    keep = kept_counts(density, len(statistics.mean), numel, op="pruned_sparsity")
    columns = (statistics.mean.tolist(), statistics.theta.tolist(), statistics.small.tolist(), keep)
    for mean, theta, small, kept in zip(*columns, strict=True):
        all_small = numel == 0 or (outlier_weighting == "clip" and theta <= eps * mean)
        shares.append(1.0 if all_small else max(numel - kept, small) / numel)
    return shares


def check_weighting(outlier_weighting: str, statistics: TaskStatistics | None, tasks: int) -> None:
    """Raise `ConfigError` if there is no such mode, or the statistics are of another number of tasks."""
    if outlier_weighting not in get_args(OutlierClipping):
        raise ConfigError(f"outlier_weighting must be clip or none, got {outlier_weighting!r}")
    if statistics is not None and len(statistics.theta) != tasks:  # kernels look theta up by task
        raise ConfigError(f"expected statistics of the {tasks} tasks, got those of {len(statistics.theta)}")


def kept_counts(density: Sequence[float] | float, tasks: int, numel: int, op: str) -> list[int]:
    """Return how many elements of each task are kept.

    Raises:
        ConfigError: a density out of range, or another number of densities than tasks.
    """
    return [kept_count(fraction, numel) for fraction in numbers_of(density, tasks, f"{op}: density")]
