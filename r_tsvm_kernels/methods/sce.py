"""SCE: select by variance over the tasks, weight by the size of what is selected, erase minority signs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from pydantic import Field
from torch import Tensor

from ..ops import accumulation_dtype, add_update, kept_count, magnitude_select
from .base import Cost, Job, MergeResult, MethodParameters, TensorReport, register
from .sparse import Share


class SceParameters(MethodParameters):
    """Parameters of `sce`."""

    select_topk: Share = Field(default=1.0, description="fraction of the elements on which tasks differ that is kept")
    int8_mask: bool = Field(default=False, description="accepted in recipes; changes nothing, masks are not stored")


def sce_cost(job: Job, options: SceParameters) -> Cost:
    """Return what `sce` takes: variances in float64, then sums and masks."""
    return Cost((48 + 4 * job.itemsize) * job.elements, 16.0 * job.tasks * job.elements)


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
    merged = erased_mean(base, tuned, selected, weights)
    total = sum(weights) or 1.0
    return MergeResult(add_update(base, merged), TensorReport(weights=[weight / total for weight in weights]))


def spreads(base: Tensor, tuned: Sequence[Tensor]) -> Tensor:
    """Return T times the variance of the T task vectors, element by element; float64."""
    mean = torch.zeros_like(base, dtype=torch.float64)
    for delta in _task_vectors(base, tuned, None):
        mean += delta
    mean /= len(tuned)
    spread = torch.zeros_like(mean)
    for delta in _task_vectors(base, tuned, None):
        distance = delta.double().sub_(mean)
        spread.addcmul_(distance, distance)
    return spread


def squared_norms(base: Tensor, tuned: Sequence[Tensor], selected: Tensor | None) -> list[float]:
    """Return the squared norm of each task vector, of its selected elements alone if some are."""
    return [float(torch.linalg.vector_norm(d.double())) ** 2 for d in _task_vectors(base, tuned, selected)]


def erased_mean(base: Tensor, tuned: Sequence[Tensor], selected: Tensor | None, weights: Sequence[float]) -> Tensor:
    """Return the weighted mean of the task vectors, of those that have the sign of their sum, element by element."""
    votes = torch.zeros_like(base, dtype=accumulation_dtype(base, *tuned))
    for delta in _task_vectors(base, tuned, selected):
        votes += delta
    merged, divisor = torch.zeros_like(votes), torch.zeros_like(votes)
    for weight, delta in zip(weights, _task_vectors(base, tuned, selected), strict=True):
        agrees = torch.where(votes >= 0, delta > 0, delta < 0)
        merged += delta.mul_(agrees).mul_(weight)
        divisor.add_(agrees, alpha=weight)
    return merged.div_(divisor.masked_fill_(divisor == 0, 1))


def _task_vectors(base: Tensor, tuned: Sequence[Tensor], selected: Tensor | None) -> Iterator[Tensor]:
    """Yield one task vector after the other, 0 where it is not selected."""
    dtype = accumulation_dtype(base, *tuned)
    for tensor in tuned:
        delta = tensor.to(dtype) - base.to(dtype)
        yield delta if selected is None else delta.mul_(selected)
