"""The spread of task vectors by the native CPU module (csrc/cpu/task_spread.cpp)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import backends
from .._native import matrix, with_rows


def run(base: Tensor, tuned: Sequence[Tensor]) -> Tensor:
    """See `task_spread`; the same bits as the reference, for all strides and numbers of threads."""
    tensors = [with_rows(tensor) for tensor in (base, *tuned)]
    views = [matrix(tensor) for tensor in tensors]
    spread = torch.empty(base.shape, dtype=torch.float64, device="cpu")
    backends.native("cpu").task_spread(views[0], views[1:], spread.data_ptr(), torch.get_num_threads())
    return spread
