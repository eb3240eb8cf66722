"""Task statistics by the native CUDA module (csrc/cuda/task_statistics.cu)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ... import backends
from .._cuda import flat, queue, workspace
from .._native import matrix
from . import TaskStatistics
from .cpu_kernel import allocate


def run(base: Tensor, tuned: Sequence[Tensor], sigma: float, eps: float) -> TaskStatistics:
    """See `task_statistics`. Queued on the current stream of the tensors' device; deterministic; never waits."""
    native = backends.native("cuda")
    tensors = [flat(tensor) for tensor in (base, *tuned)]
    views = [matrix(tensor) for tensor in tensors]
    result, addresses = allocate(base, len(tuned))
    memory = workspace(native.task_statistics_workspace(base.numel(), len(tuned)), base)
    native.task_statistics(views[0], views[1:], sigma, eps, addresses, memory.data_ptr(), *queue(base))
    return result
