"""SCE: select by variance over the tasks, weight by the size of what is selected, erase minority signs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from ..ops import accumulation_dtype, add_update, kept_count, magnitude_select
from .base import Cost, Job, MergeResult, MethodParameters, TensorReport, register, tile_elements
from .sparse import Share


class SceParameters(MethodParameters):
    """Parameters of `sce`."""

    select_topk: Share = Field(default=1.0, description="fraction of the elements on which tasks differ that is kept")
    int8_mask: bool = Field(default=False, description="accepted in recipes; changes nothing, masks are not stored")


def sce_cost(job: Job, options: SceParameters) -> Cost:
    """Return what `sce` takes: variances in float64, then sums and masks; the task vectors of a piece at one time."""
    piece = 16 * (job.tasks + 4) * min(tile_elements(job.device_type), job.elements)
    return Cost((48 + 4 * job.itemsize) * job.elements + piece, 16.0 * job.tasks * job.elements)


@register(
    "sce",
    pretty_name="SCE",
    paper_url="https://arxiv.org/abs/2408.07990",
    parameters=SceParameters,
    cost=sce_cost,
)
def sce(base: Tensor, tuned: Sequence[Tensor], options: SceParameters) -> MergeResult:
    """Select, calculate, erase (FuseChat, Wan et al., 2024), element by element.

    Of the elements on which the tasks differ, those of the largest variance stay. A task weighs as much as its squares
    there, times its `weight`. Elements against the sign of the sum over the tasks are erased; the rest is averaged.
    """
    selected = None
    if options.select_topk < 1 and len(tuned) > 1:  # one task has no variance to select by
        spread = spreads(base, tuned)
        kept = kept_count(options.select_topk, int(spread.count_nonzero()))
        selected = magnitude_select(spread, kept).mask(spread)
        del spread
    squares = squared_norms(base, tuned, selected)
    weights = [own * user / (max(squares) or 1.0) for own, user in zip(squares, options.weight, strict=True)]
    merged = add_erased_mean(base, tuned, selected, weights)
    total = sum(weights) or 1.0
    return MergeResult(merged, TensorReport(weights=[weight / total for weight in weights]))


def spreads(base: Tensor, tuned: Sequence[Tensor]) -> Tensor:
    """Return T times the variance of the T task vectors, element by element; float64."""
    spread = torch.empty(base.shape, dtype=torch.float64, device=base.device)

    def fill(out: Tensor, start: Tensor, *parts: Tensor) -> None:
        deltas = [delta.double() for delta in _task_vectors(start, parts, None)]
        mean = sum(deltas[1:], deltas[0]) / len(deltas)
        out.zero_()
        for delta in deltas:
            out.addcmul_(distance := delta.sub_(mean), distance)

    _in_tiles(fill, spread, base, *tuned)
    return spread


def squared_norms(base: Tensor, tuned: Sequence[Tensor], selected: Tensor | None) -> list[float]:
    """Return the squared norm of each task vector, of its selected elements alone if some are."""

    def squares(start: Tensor, mask: Tensor | None, *parts: Tensor) -> Tensor:
        return torch.stack([delta.double().square_().sum() for delta in _task_vectors(start, parts, mask)])

    found = _in_tiles(squares, base, selected, *tuned)
    return torch.stack(found).sum(0).tolist() if found else [0.0] * len(tuned)


def add_erased_mean(base: Tensor, tuned: Sequence[Tensor], selected: Tensor | None, weights: Sequence[float]) -> Tensor:
    """Add the weighted mean of the task vectors, of those that have the sign of their sum, element by element."""
    merged = torch.empty(base.shape, dtype=accumulation_dtype(base, *tuned), device=base.device)

    def fill(out: Tensor, start: Tensor, mask: Tensor | None, *parts: Tensor) -> None:
        deltas = list(_task_vectors(start, parts, mask))
        side = (sum(deltas[1:], deltas[0]) >= 0).to(out.dtype).mul_(2).sub_(1)  # 1 or -1
        total, divisor = torch.zeros_like(out), torch.zeros_like(out)
        for weight, delta in zip(weights, deltas, strict=True):
            magnitude = delta.mul_(side).clamp_(min=0)  # 0 on the other side
            total.add_(magnitude, alpha=weight)
            divisor.add_(magnitude > 0, alpha=weight)
        out.copy_(add_update(start, total.mul_(side).div_(divisor.masked_fill_(divisor == 0, 1))))

    _in_tiles(fill, merged, base, selected, *tuned)
    return merged


def _in_tiles(call: Callable[..., Any], *tensors: Tensor | None) -> list[Any]:
    """Call a function with the same piece of all tensors, piece by piece.

    On a CPU they are too small for torch to share them among threads: they gain more from the cache.
    """
    flat = [None if tensor is None else tensor.reshape(-1) for tensor in tensors]
    first = next(tensor for tensor in flat if tensor is not None)
    step = tile_elements(first.device.type)
    return [
        call(*(None if tensor is None else tensor[begin : begin + step] for tensor in flat))
        for begin in range(0, first.numel(), step)
    ]


def _task_vectors(base: Tensor, tuned: Sequence[Tensor], selected: Tensor | None) -> Iterator[Tensor]:
    """Yield one task vector after the other, 0 where it is not selected."""
    dtype = accumulation_dtype(base, *tuned)
    for tensor in tuned:
        delta = tensor.to(dtype) - base.to(dtype)
        yield delta if selected is None else delta.mul_(selected)
