"""Clipping, pruning and splitting by the native CUDA module (csrc/cuda/reweight_prune.cu)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._cuda import flat
from .._planes import Planes
from ..reweight_prune.cuda_kernel import prune
from ..task_statistics import TaskStatistics


def run(
    base: Tensor,
    tuned: Sequence[Tensor],
    statistics: TaskStatistics,
    outlier_weighting: str,
    keep: Sequence[int],
    scale: Tensor,
) -> Planes:
    """See `reweight_prune_planes`. Waits for the device once, if a task is pruned: to refuse NaN and infinity."""
    hi = torch.empty(len(tuned), *base.shape, dtype=torch.float16, device=base.device)
    planes = Planes(hi, torch.empty_like(hi), scale)
    inputs = [flat(tensor) for tensor in tuned]
    prune(flat(base), inputs, statistics, outlier_weighting, keep, list(hi.unbind()), planes)
    return planes
