"""Outlier clipping and magnitude pruning in place, in torch: the definition of correct."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..reweight_prune import reference
from ..task_statistics import TaskStatistics


def run(deltas: Sequence[Tensor], statistics: TaskStatistics, outlier_weighting: str, keep: Sequence[int]) -> None:
    """See `reweight_prune_`; `keep` holds the number of survivors of each task."""
    zeros = deltas[0].new_zeros(()).expand_as(deltas[0])
    # All are computed before the first is overwritten: an error leaves them alone.
    pruned = reference.run(zeros, deltas, statistics, outlier_weighting, keep)
    for delta, result in zip(deltas, pruned, strict=True):
        delta.copy_(result)
