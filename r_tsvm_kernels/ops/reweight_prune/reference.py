"""Outlier clipping and magnitude pruning in torch: the definition of correct."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._checks import accumulation_dtype
from ..magnitude_select import magnitude_select


def run(base: Tensor, tuned: Sequence[Tensor], theta: Tensor | None, counts: Sequence[int]) -> list[Tensor]:
    """See `reweight_prune`; `theta` holds the limit to clip each task at, `counts` how many of its elements stay."""
    dtype = accumulation_dtype(base, *tuned)
    pruned = []
    for task, (weight, count) in enumerate(zip(tuned, counts, strict=True)):
        delta = weight.to(dtype) - base.to(dtype)
        if theta is not None:
            limit = theta[task].to(dtype)
            delta = torch.clamp(delta, -limit, limit)
        if count < delta.numel():
            delta = torch.where(magnitude_select(delta, count, backend="torch").mask(delta), delta, 0)
        pruned.append(delta)
    return pruned
