"""Outlier clipping and magnitude pruning in torch: the definition of correct."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._checks import accumulation_dtype
from ..magnitude_select import magnitude_select
from ..task_statistics import TaskStatistics


def run(
    base: Tensor, tuned: Sequence[Tensor], statistics: TaskStatistics, outlier_weighting: str, counts: Sequence[int]
) -> list[Tensor]:
    """See `reweight_prune`; `counts` holds the number of survivors of each task."""
    dtype = accumulation_dtype(base, *tuned)
    pruned = []
    for task, (weight, count) in enumerate(zip(tuned, counts, strict=True)):
        delta = weight.to(dtype) - base.to(dtype)
        if outlier_weighting == "clip":
            theta = statistics.theta[task].to(dtype)
            delta = torch.clamp(delta, -theta, theta)
        if count < delta.numel():
            delta = torch.where(magnitude_select(delta, count, backend="torch").mask(delta), delta, 0)
        pruned.append(delta)
    return pruned
