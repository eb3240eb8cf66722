"""Outlier clipping and magnitude pruning in place by the native CUDA module (csrc/cuda/reweight_prune.cu)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..reweight_prune.cuda_kernel import prune
from ..task_statistics import TaskStatistics


def run(deltas: Sequence[Tensor], statistics: TaskStatistics, outlier_weighting: str, keep: Sequence[int]) -> None:
    """See `reweight_prune_`. Needs a few bytes per thousand elements as memory of its own."""
    prune(None, deltas, statistics, outlier_weighting, keep, deltas)
