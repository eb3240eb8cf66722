"""Outlier clipping and magnitude pruning by the native CUDA module (csrc/cuda/reweight_prune.cu)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import backends
from .._checks import accumulation_dtype, raise_not_finite
from .._cuda import flat, queue, workspace
from .._native import matrix


def run(base: Tensor, tuned: Sequence[Tensor], theta: Tensor | None, counts: Sequence[int]) -> list[Tensor]:
    """See `reweight_prune`. Waits for the device once if a task is pruned: to refuse NaN and infinity."""
    native = backends.native("cuda")
    device, numel, dtype = base.device, base.numel(), accumulation_dtype(base, *tuned)
    results = [torch.empty(base.shape, dtype=dtype, device=device) for _ in tuned]
    origin, *tensors = (flat(tensor) for tensor in (base, *tuned))
    theta = None if theta is None else theta.to(device)
    pruned = [index for index, count in enumerate(counts) if count < numel]
    place = {index: place for place, index in enumerate(pruned)}
    tasks = [
        (
            matrix(tensor),
            0 if theta is None else theta[index].data_ptr(),
            counts[index],
            results[index].data_ptr(),
            place.get(index, -1),
        )
        for index, tensor in enumerate(tensors)
    ]
    threshold = torch.empty(len(pruned), dtype=torch.float64, device=device)
    ties, tied, nonfinite = torch.empty((3, len(pruned)), dtype=torch.int64, device=device).unbind()
    selections = (threshold.data_ptr(), ties.data_ptr(), tied.data_ptr(), nonfinite.data_ptr())
    memory = workspace(native.reweight_prune_workspace(numel, len(pruned)), base)
    where = (memory.data_ptr(), *queue(base))
    wide = dtype == torch.float64
    if pruned:
        native.reweight_prune_select(matrix(origin), [tasks[index] for index in pruned], wide, selections, *where)
        for bad in nonfinite.tolist():
            if bad:
                raise_not_finite("reweight_prune", bad, numel)
    native.reweight_prune_apply(matrix(origin), tasks, wide, selections, len(pruned), *where)
    return results
