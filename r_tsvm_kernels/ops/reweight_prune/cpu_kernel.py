"""Outlier clipping and magnitude pruning by the native CPU module (csrc/cpu/reweight_prune.cpp)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ... import backends
from .._checks import accumulation_dtype, raise_not_finite
from .._native import matrix, with_rows


def run(base: Tensor, tuned: Sequence[Tensor], theta: Tensor | None, counts: Sequence[int]) -> list[Tensor]:
    """See `reweight_prune`. Usually reads the inputs once; stores no task vectors except the results."""
    tensors = [with_rows(tensor) for tensor in (base, *tuned)]
    origin, *views = (matrix(tensor) for tensor in tensors)
    thetas = [math.inf] * len(tuned) if theta is None else theta.tolist()
    dtype = accumulation_dtype(*tensors)
    results = [torch.empty(base.shape, dtype=dtype, device="cpu") for _ in tuned]
    nonfinite = torch.zeros(len(tuned), dtype=torch.int64, device="cpu")
    outputs = [(result.data_ptr(), count.data_ptr()) for result, count in zip(results, nonfinite.unbind(), strict=True)]
    tasks = [(*task, *output) for *task, output in zip(views, thetas, counts, outputs, strict=True)]
    backends.native("cpu").reweight_prune(origin, tasks, torch.get_num_threads())
    for bad in nonfinite.tolist():
        if bad:
            raise_not_finite("reweight_prune", bad, base.numel())
    return results
