"""Outlier clipping and magnitude pruning by the native CUDA module (csrc/cuda/reweight_prune.cu)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import backends
from .._checks import accumulation_dtype, raise_not_finite
from .._cuda import flat, queue, workspace
from .._native import matrix
from .._planes import Planes
from ..task_statistics import TaskStatistics


def run(
    base: Tensor, tuned: Sequence[Tensor], statistics: TaskStatistics, outlier_weighting: str, keep: Sequence[int]
) -> list[Tensor]:
    """See `reweight_prune`. Waits for the device once, if a task is pruned: to refuse NaN and infinity."""
    dtype = accumulation_dtype(base, *tuned)
    results = [torch.empty(base.shape, dtype=dtype, device=base.device) for _ in tuned]
    prune(flat(base), [flat(tensor) for tensor in tuned], statistics, outlier_weighting, keep, results)
    return results


def prune(
    base: Tensor | None,
    tuned: Sequence[Tensor],
    statistics: TaskStatistics,
    outlier_weighting: str,
    keep: Sequence[int],
    results: Sequence[Tensor],
    planes: Planes | None = None,
) -> None:
    """Write the results, which may be the fine-tuned tensors; without a base, of a base of zeros. All contiguous.

    With `planes` the results are its high planes; the low ones are written, too.
    """
    native = backends.native("cuda")
    device, numel = tuned[0].device, tuned[0].numel()
    thetas = statistics.theta.to(device)
    pruned = [index for index, count in enumerate(keep) if count < numel]
    place = {index: place for place, index in enumerate(pruned)}
    # Where the low planes go, and the inverse scales.
    splits = [(0, 0)] * len(tuned)
    if planes is not None and planes.lo is not None:
        inverse = 1 / planes.scale
        splits = [(low.data_ptr(), one.data_ptr()) for low, one in zip(planes.lo, inverse, strict=True)]
    tasks = [
        (
            matrix(tensor),
            thetas[index].data_ptr() if outlier_weighting == "clip" else 0,
            keep[index],
            results[index].data_ptr(),
            place.get(index, -1),
            splits[index],
        )
        for index, tensor in enumerate(tuned)
    ]
    threshold = torch.empty(len(pruned), dtype=torch.float64, device=device)
    ties, tied, nonfinite = torch.empty((3, len(pruned)), dtype=torch.int64, device=device).unbind()
    selections = (threshold.data_ptr(), ties.data_ptr(), tied.data_ptr(), nonfinite.data_ptr())
    memory = workspace(native.reweight_prune_workspace(numel, len(pruned)), tuned[0])
    where = (memory.data_ptr(), *queue(tuned[0]))
    origin = None if base is None else matrix(base)
    wide = results[0].dtype == torch.float64
    if pruned:
        native.reweight_prune_select(origin, [tasks[index] for index in pruned], wide, selections, *where)
        for bad in nonfinite.tolist():
            if bad:
                raise_not_finite("reweight_prune", bad, numel)
    native.reweight_prune_apply(origin, tasks, wide, selections, len(pruned), *where)
