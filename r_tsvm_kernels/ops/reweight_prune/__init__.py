"""Outlier-aware reweighting and magnitude pruning of task vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from torch import Tensor

from ... import dispatch
from ...errors import ConfigError
from .._checks import check_group, numbers_of
from ..magnitude_select import kept_count
from ..task_statistics import TaskStatistics

OutlierWeighting = Literal["clip", "damp", "boost", "none"]


@dispatch.op(cpu=("cpu", "torch"), cuda=("torch", "cuda", "triton"), small={"BLOCK": 128})
def reweight_prune(
    base: Tensor,
    tuned: Sequence[Tensor],
    statistics: TaskStatistics,
    outlier_weighting: OutlierWeighting = "clip",
    density: Sequence[float] | float = 1.0,
    *,
    backend: str | None = None,
) -> list[Tensor]:
    """Form the task vectors ``D_t = tuned[t] - base``, clip their outliers and prune them.

    ``clip`` replaces D_t by ``sign(D_t) * min(|D_t|, theta_t)``; the other modes leave the elements alone, their scalar
    weights come from `outlier_weights`. Then exactly ``ceil(density_t * numel)`` elements of largest magnitude are
    kept, the lowest flat index first among equals, and the rest become 0.

    Args:
        base: any shape, float64, float32, float16 or bfloat16.
        tuned: T tensors of the same shape and device.
        statistics: of these tensors, from `task_statistics`.
        outlier_weighting: ``clip``, ``damp``, ``boost`` or ``none``.
        density: fraction kept, in [0, 1], one number or one per task.
        backend: run this implementation or raise; None takes the fastest one that is available.

    Returns:
        T new tensors of the inputs' shape, float32 (float64 if any input is float64).

    Raises:
        ShapeError, DTypeError, DeviceError: the tensors do not match.
        ConfigError: an unknown mode, statistics of another number of tasks, or a density out of range or of the wrong
            number.
        NonFiniteError: a task vector that must be pruned holds NaN or infinity.
        BackendUnavailableError: `backend` cannot run here.
    """
    check_group(base, tuned, op="reweight_prune")
    check_weighting(outlier_weighting, statistics, len(tuned))
    keep = kept_counts(density, len(tuned), base.numel(), op="reweight_prune")
    run = dispatch.select("reweight_prune", base, *tuned, backend=backend)
    result: list[Tensor] = run(base, tuned, statistics, outlier_weighting, keep)
    return result


def pruned_sparsity(
    statistics: TaskStatistics,
    outlier_weighting: OutlierWeighting = "clip",
    density: Sequence[float] | float = 1.0,
    eps: float = 0.1,
) -> list[float]:
    """Return for each task the share of elements of ``reweight_prune``'s result with magnitude at most ``eps * mean``.

    Nothing is read for it. If the smallest kept magnitude is larger than the limit, the small elements are those that
    pruning dropped; if not, they are those that were small before it. So the count is the larger of the two, unless
    clipping has made every element small.

    Args:
        statistics: from `task_statistics` with the same `eps`.
        outlier_weighting: as for `reweight_prune`.
        density: as for `reweight_prune`.
        eps: multiple of the mean magnitude up to which an element is small.

    Raises:
        ConfigError: a density out of range or of the wrong number.
    """
    numel = statistics.numel
    shares = []
    keep = kept_counts(density, len(statistics.mean), numel, op="pruned_sparsity")
    columns = (statistics.mean.tolist(), statistics.theta.tolist(), statistics.small.tolist(), keep)
    for mean, theta, small, kept in zip(*columns, strict=True):
        all_small = numel == 0 or (outlier_weighting == "clip" and theta <= eps * mean)
        shares.append(1.0 if all_small else max(numel - kept, small) / numel)
    return shares


def check_weighting(outlier_weighting: str, statistics: TaskStatistics, tasks: int) -> None:
    """Raise `ConfigError` if there is no such mode, or the statistics are not of so many tasks."""
    if outlier_weighting not in get_args(OutlierWeighting):
        raise ConfigError(f"outlier_weighting must be clip, damp, boost or none, got {outlier_weighting!r}")
    if len(statistics.theta) != tasks:  # kernels look theta up by task
        raise ConfigError(f"expected statistics of the {tasks} tasks, got those of {len(statistics.theta)}")


def kept_counts(density: Sequence[float] | float, tasks: int, numel: int, op: str) -> list[int]:
    """Return how many elements of each task are kept.

    Raises:
        ConfigError: a density out of range or of the wrong number.
    """
    return [kept_count(fraction, numel) for fraction in numbers_of(density, tasks, f"{op}: density")]


def outlier_weights(statistics: TaskStatistics, outlier_weighting: OutlierWeighting) -> list[float]:
    """Return one weight per task, of mean 1, from the outlier masses q_t.

    ``damp``: ``T (1 - q_t) / sum(1 - q)``; ``boost``: ``T q_t / sum(q)``; ``clip`` and ``none``: 1. A sum of 0 gives 1
    everywhere. Our reconstruction of the outlier weighting of R-TSVM (arXiv 2502.06876), which leaves the direction
    open; equal tasks get equal weights.
    """
    masses: list[float] = statistics.outlier_mass.tolist()
    if outlier_weighting in ("clip", "none"):
        return [1.0] * len(masses)
    shares = [1.0 - q for q in masses] if outlier_weighting == "damp" else masses
    total = sum(shares)
    return [len(shares) * share / total for share in shares] if total > 0 else [1.0] * len(shares)
