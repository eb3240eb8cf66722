"""Outlier clipping and magnitude pruning in place, by the Triton kernels that do it on the way out."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..reweight_prune.triton_kernel import prune_into
from ..task_statistics import TaskStatistics


def run(deltas: Sequence[Tensor], statistics: TaskStatistics, outlier_weighting: str, keep: Sequence[int]) -> None:
    """See `reweight_prune_`. Waits for the device once if anything is pruned: to refuse NaN and infinity."""
    theta = statistics.theta if outlier_weighting == "clip" else None
    prune_into(deltas, None, deltas, theta, keep, op="reweight_prune_")
