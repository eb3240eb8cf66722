"""Ops in hand-optimised PyTorch: the best that a user gets without this package.

The references are written to be read; these are written to be fast, and give the same exact results.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops import MagnitudeSelection


def statistics(base: Tensor, tuned: Sequence[Tensor], sigma: float = 3.0, eps: float = 0.1) -> list[Tensor]:
    """Return mean, sd, outlier mass and number of small elements by task."""
    columns = []
    for tensor in tuned:
        magnitude = (tensor.float() - base.float()).abs_()
        mean = magnitude.mean(dtype=torch.float64)
        second = torch.linalg.vector_norm(magnitude, dtype=torch.float64).square() / magnitude.numel()
        theta = mean + sigma * (second - mean.square()).sqrt()
        above = torch.where(magnitude > theta, magnitude, 0).sum(dtype=torch.float64)
        small = (magnitude <= eps * mean).sum()
        columns.append((mean, theta, above / (mean * magnitude.numel()), small))
    return [torch.stack(column) for column in zip(*columns, strict=True)]


def select(x: Tensor, keep: int) -> MagnitudeSelection:
    """Return the threshold of the `keep` largest magnitudes, by counting leading bits instead of sorting.

    16-bit numbers have 2^15 magnitudes. float32 needs a second pass over the values that share 15 bits with the
    threshold.
    """
    integer, bits = (torch.int32, 31) if x.dtype == torch.float32 else (torch.int16, 15)
    patterns = x.flatten().view(integer) & torch.iinfo(integer).max
    digits = patterns >> (bits - 15)
    digit, above = _reached(torch.bincount(digits, minlength=1 << 15), keep)
    if bits == 15:
        return MagnitudeSelection(digit.to(torch.int16).view(x.dtype), keep - above)
    inside = patterns[digits == digit] & 0xFFFF
    last, more = _reached(torch.bincount(inside, minlength=1 << 16), keep - above)
    return MagnitudeSelection(((digit << 16) + last).int().view(x.dtype), keep - above - more)


def _reached(counts: Tensor, keep: int | Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest digit with at least `keep` elements at or above it, and how many are above it."""
    from_above = counts.flip(0).cumsum(0)
    place = (from_above < keep).sum()
    return len(counts) - 1 - place, from_above[place] - counts.flip(0)[place]


def ranks(x: Tensor) -> Tensor:
    """Return the ranks of magnitudes within rows with one sort."""
    order = x.abs().argsort(dim=-1, descending=True, stable=True)
    falling = torch.arange(x.shape[-1] - 1, -1, -1, dtype=torch.int32, device=x.device).expand_as(order)
    return torch.empty_like(order, dtype=torch.int32).scatter_(-1, order, falling)


def prune(base: Tensor, tuned: Sequence[Tensor], theta: Tensor, keep: int) -> list[Tensor]:
    """Clip and prune task vectors, in place once they are formed."""
    pruned = []
    for tensor, limit in zip(tuned, theta.float(), strict=True):
        delta = tensor.float() - base.float()
        delta = torch.clamp(delta, -limit, limit, out=delta)
        pruned.append(delta.masked_fill_(~select(delta, keep).mask(delta), 0))
    return pruned


def _task_vector(base: Tensor, tuned: Tensor) -> Tensor:
    return tuned.to(torch.float32, copy=True).sub_(base)  # float() would hand out a float32 input itself


def gram(base: Tensor, tuned: Sequence[Tensor]) -> Tensor:
    """Return the products of task vectors: in float32, blocks of a few thousand summed in float64."""
    X = torch.stack([_task_vector(base, tensor) for tensor in tuned]).flatten(1)
    whole = X.shape[1] // 4096 * 4096
    blocks = X[:, :whole].reshape(len(X), -1, 4096).transpose(0, 1)
    rest = X[:, whole:].double()
    return (blocks @ blocks.mT).sum(0, dtype=torch.float64) + rest @ rest.mT


def spread(base: Tensor, tuned: Sequence[Tensor]) -> Tensor:
    """Return T times the variance over the tasks."""
    deltas = torch.stack([_task_vector(base, tensor) for tensor in tuned]).double()
    return deltas.sub_(deltas.mean(0)).square_().sum(0)


def add(base: Tensor, update: Tensor, alpha: float) -> Tensor:
    """Add an update to a weight."""
    return torch.add(base.float(), update, alpha=alpha)


def sum_tasks(base: Tensor, *tuned: Tensor) -> Tensor:
    """Add all task vectors to the weight."""
    start = base.float()
    total = torch.zeros_like(start)
    for tensor in tuned:
        total += tensor.float() - start
    return start + total


def ties(base: Tensor, *tuned: Tensor) -> Tensor:
    """Elect a sign by the sum and average the values of that sign: TIES without trimming."""
    start = base.float()
    vectors = torch.stack([tensor.float() - start for tensor in tuned])
    agrees = torch.where(vectors.sum(0) >= 0, vectors > 0, vectors < 0)
    return start + (vectors * agrees).sum(0) / agrees.sum(0).clamp(min=1)
