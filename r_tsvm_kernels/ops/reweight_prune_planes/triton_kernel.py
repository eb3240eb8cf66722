"""Clipping, pruning and splitting in Triton: the kernels of `reweight_prune`, which store planes here."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._planes import Planes
from .._triton import flat
from ..reweight_prune.triton_kernel import prune_into
from ..task_statistics import TaskStatistics


def run(
    base: Tensor,
    tuned: Sequence[Tensor],
    statistics: TaskStatistics,
    outlier_weighting: str,
    keep: Sequence[int],
    scale: Tensor,
) -> Planes:
    """See `reweight_prune_planes`. Waits for the device once if anything is pruned: to refuse NaN and infinity."""
    hi = torch.empty(len(tuned), *base.shape, dtype=torch.float16, device=base.device)
    planes = Planes(hi, torch.empty_like(hi), scale)
    theta = statistics.theta if outlier_weighting == "clip" else None
    inputs = [flat(tensor) for tensor in tuned]
    prune_into(list(hi.unbind()), flat(base), inputs, theta, keep, op="reweight_prune_planes", planes=planes)
    return planes
