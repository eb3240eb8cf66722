"""Clipping, pruning and splitting in torch: the definition of correct."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import dispatch
from .._planes import Planes, split
from ..task_statistics import TaskStatistics


def run(
    base: Tensor,
    tuned: Sequence[Tensor],
    statistics: TaskStatistics,
    outlier_weighting: str,
    keep: Sequence[int],
    scale: Tensor,
) -> Planes:
    """See `reweight_prune_planes`."""
    pruned = dispatch.select("reweight_prune", base, *tuned)(base, tuned, statistics, outlier_weighting, keep)
    return Planes(*split(torch.stack(pruned) / scale[:, None, None], low=True), scale)
