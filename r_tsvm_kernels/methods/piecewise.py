"""Element-wise formulas in torch, some elements at a time, so that no task vector is stored."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops._checks import accumulation_dtype, tile_elements
from .base import Cost, TensorJob

# Copies of a piece that a formula may hold, beside one of each task.
_COPIES = 8


def pieces(base: Tensor, tuned: Sequence[Tensor]) -> Iterator[tuple[slice, Tensor, list[Tensor]]]:
    """Yield the place of each piece, the base there, and the task vectors; all in the dtype of the merge."""
    dtype, size = accumulation_dtype(base, *tuned), tile_elements(base.device.type)
    flat = [tensor.reshape(-1) for tensor in (base, *tuned)]
    for first in range(0, base.numel(), size):
        place = slice(first, first + size)
        start, *models = (tensor[place].to(dtype) for tensor in flat)
        yield place, start, [model - start for model in models]


def plus_update(base: Tensor, tuned: Sequence[Tensor], update: Callable[[list[Tensor]], Tensor]) -> Tensor:
    """Return the base plus an update that depends on the task vectors of the same element alone.

    Args:
        base: any shape.
        tuned: the models.
        update: gives the update of a piece from its task vectors, which it may change.
    """
    merged = torch.empty(base.shape, dtype=accumulation_dtype(base, *tuned), device=base.device)
    for place, start, deltas in pieces(base, tuned):
        torch.add(start, update(deltas), out=merged.view(-1)[place])
    return merged


def piecewise_cost(job: TensorJob, options: Any) -> Cost:
    """Return the cost of `plus_update`: the result, and some copies of a piece."""
    piece = min(tile_elements(job.device_type), job.elements)
    copies = 8 * (2 * job.tasks + _COPIES) * piece
    return Cost(job.itemsize * job.elements + copies, (4.0 * job.tasks + 4) * job.elements)
