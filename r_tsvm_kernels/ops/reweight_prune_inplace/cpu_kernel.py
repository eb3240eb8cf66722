"""Outlier clipping and magnitude pruning in place by the native CPU module (csrc/cpu/reweight_prune_inplace.cpp)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ... import backends
from .._checks import raise_not_finite
from .._native import ELEMENT_TYPES, aligned
from ..task_statistics import TaskStatistics


def run(deltas: Sequence[Tensor], statistics: TaskStatistics, outlier_weighting: str, keep: Sequence[int]) -> None:
    """See `reweight_prune_`; `keep` holds the number of survivors of each task."""
    thetas = statistics.theta.tolist() if outlier_weighting == "clip" else [math.inf] * len(deltas)
    nonfinite = torch.zeros(len(deltas), dtype=torch.int64)
    matrices = [aligned(delta) for delta in deltas]
    tasks = [
        (matrix.data_ptr(), theta, count, bad.data_ptr())
        for matrix, theta, count, bad in zip(matrices, thetas, keep, nonfinite, strict=True)
    ]
    numel, kind = deltas[0].numel(), ELEMENT_TYPES[deltas[0].dtype]
    backends.native("cpu").reweight_prune_inplace(tasks, numel, kind, torch.get_num_threads())
    for bad in nonfinite.tolist():
        if bad:
            raise_not_finite("reweight_prune_", bad, numel)
    for delta, matrix in zip(deltas, matrices, strict=True):
        if matrix is not delta:
            delta.copy_(matrix)
