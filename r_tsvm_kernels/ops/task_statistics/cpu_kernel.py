"""Task statistics by the native CPU module (csrc/cpu/task_statistics.cpp)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import backends
from .._native import matrix, with_rows
from . import TaskStatistics

Addresses = tuple[int, int, int, int, int, int, int]


def run(base: Tensor, tuned: Sequence[Tensor], sigma: float, eps: float) -> TaskStatistics:
    """See `task_statistics`. The bits of the result do not depend on strides or on the number of threads."""
    tensors = [with_rows(tensor) for tensor in (base, *tuned)]
    views = [matrix(tensor) for tensor in tensors]
    result, addresses = allocate(base, len(tuned))
    backends.native("cpu").task_statistics(views[0], views[1:], sigma, eps, addresses, torch.get_num_threads())
    return result


def allocate(base: Tensor, tasks: int) -> tuple[TaskStatistics, Addresses]:
    """Return uninitialised statistics and the addresses of mean, sd, max, zeros, theta, outlier_mass and small."""
    mean, sd, largest, theta, outlier_mass = torch.empty((5, tasks), dtype=torch.float64, device=base.device).unbind()
    zeros, small = torch.empty((2, tasks), dtype=torch.int64, device=base.device).unbind()
    outputs = (mean, sd, largest, zeros, theta, outlier_mass, small)
    addresses = tuple(tensor.data_ptr() for tensor in outputs)
    return TaskStatistics(base.numel(), *outputs), addresses  # type: ignore[return-value]
