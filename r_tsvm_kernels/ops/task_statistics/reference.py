"""Task statistics in torch: the definition of correct."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .._checks import accumulation_dtype
from . import TaskStatistics


def run(base: Tensor, tuned: Sequence[Tensor], sigma: float, eps: float) -> TaskStatistics:
    """See `task_statistics`."""
    dtype = accumulation_dtype(base, *tuned)
    columns = [_magnitude_statistics((t.to(dtype) - base.to(dtype)).abs(), sigma, eps) for t in tuned]
    mean, sd, largest, zeros, theta, outlier_mass, small = (
        torch.stack(column) for column in zip(*columns, strict=True)
    )
    return TaskStatistics(
        numel=base.numel(), mean=mean, sd=sd, max=largest, zeros=zeros, theta=theta, outlier_mass=outlier_mass,
        small=small,
    )  # fmt: skip


def _magnitude_statistics(a: Tensor, sigma: float, eps: float) -> tuple[Tensor, ...]:
    a = a.double()
    if a.numel() == 0:
        zero, none = a.new_zeros(()), torch.zeros((), dtype=torch.int64, device=a.device)
        return zero, zero, zero, none, zero, zero, none
    mean = a.mean()
    sd = (a - mean).square().mean().sqrt()
    theta = mean.new_tensor(math.inf) if math.isinf(sigma) else mean + sigma * sd
    total = a.sum()
    outlier_mass = torch.where(total > 0, a[a > theta].sum() / total, total)
    return mean, sd, a.amax(), (a == 0).sum(), theta, outlier_mass, (a <= eps * mean).sum()
