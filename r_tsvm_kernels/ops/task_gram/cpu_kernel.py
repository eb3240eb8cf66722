"""Gram matrices of task vectors by the native CPU module (csrc/cpu/task_gram.cpp)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import backends
from .._native import matrix, with_rows


def run(tuned: Sequence[Tensor], base: Tensor | None, mask: Tensor | None) -> Tensor:
    """See `task_gram`. The bits of the result do not depend on strides or on the number of threads."""
    tensors = [with_rows(tensor) for tensor in tuned]
    origin = None if base is None else with_rows(base)
    chosen = None if mask is None else mask.contiguous()
    gram = torch.empty(len(tuned), len(tuned), dtype=torch.float64, device="cpu")
    backends.native("cpu").task_gram(
        [matrix(tensor) for tensor in tensors], None if origin is None else matrix(origin),
        0 if chosen is None else chosen.data_ptr(), gram.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return gram
