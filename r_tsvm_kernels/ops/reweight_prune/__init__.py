"""Outlier-aware reweighting and magnitude pruning of task vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from ... import dispatch
from ...errors import ConfigError
from .._checks import check_group
from ..magnitude_select import kept_count
from ..task_statistics import TaskStatistics

OutlierWeighting = Literal["clip", "damp", "boost", "none"]


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
        ConfigError: an unknown mode, or a density out of range or of the wrong number.
        NonFiniteError: a task vector that must be pruned holds NaN or infinity.
        BackendUnavailable: `backend` cannot run here.
    """
    check_group(base, tuned, op="reweight_prune")
    if outlier_weighting not in ("clip", "damp", "boost", "none"):
        raise ConfigError(f"outlier_weighting must be clip, damp, boost or none, got {outlier_weighting!r}")
    densities = [density] * len(tuned) if isinstance(density, int | float) else list(density)
    if len(densities) != len(tuned):
        raise ConfigError(f"reweight_prune: {len(tuned)} tasks but {len(densities)} densities")
    keep = [kept_count(fraction, base.numel()) for fraction in densities]
    run = dispatch.select("reweight_prune", base, *tuned, backend=backend)
    result: list[Tensor] = run(base, tuned, statistics, outlier_weighting, keep)
    return result


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
