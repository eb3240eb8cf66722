"""SCE: select elements by variance over the tasks, calculate weights from them, erase minority signs.

1. Select: D'_t are the elements of ``D_t = W_t - W_0`` with the largest ``sum_t (D_t - mean_t(D_t))^2``: the share
   `select_topk` of the elements in which the tasks differ.
2. Calculate: ``c_t = w_t * norm(D'_t)^2``.
3. Erase: with the sign ``s = sign(sum_t D'_t)`` of each element::

       W = W_0 + sum_t(c_t [sign(D'_t) = s] D'_t) / sum_t(c_t [sign(D'_t) = s])

Source: Wan et al., "FuseChat: Knowledge Fusion of Chat Models", arXiv 2408.07990.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from pydantic import Field
from torch import Tensor

from .. import dispatch
from ..ops import Sparsifier, elect_and_sum, kept_count, spread_mask, spread_select, task_gram
from .base import Cost, MethodParameters, TensorJob, register
from .gram import checked, gram_bytes
from .recall import recalled
from .reports import MergeResult, TensorReport
from .sparsify import Share


class SceParameters(MethodParameters):
    """Parameters of `sce`."""

    select_topk: Share = Field(default=1.0, description="fraction of the elements on which tasks differ that is kept")
    int8_mask: bool = Field(default=False, description="accepted in recipes and ignored: masks are not stored")


def sce_cost(job: TensorJob, options: SceParameters) -> Cost:
    """Return the cost of `sce`: the selection by variances, which kernels of a CPU do not store, and the election."""
    per_element = 48 + 4 * job.itemsize
    if dispatch.by_reference(job.device_type, "elect_and_sum", "spread_mask", "spread_select", "task_gram"):
        per_element = max(per_element, (2 * job.tasks + 8) * job.itemsize + 81)
    elif job.device_type == "cpu":
        per_element = max(4, 1 + job.summed)  # at most an eighth of the variances twice, or the mask and the result
    return Cost(per_element * job.elements + gram_bytes(job), 16.0 * job.tasks * job.elements)


@register(
    "sce",
    pretty_name="SCE",
    paper_url="https://arxiv.org/abs/2408.07990",
    parameters=SceParameters,
    ops=("elect_and_sum", "spread_mask", "spread_select", "task_gram"),
    cost=sce_cost,
)
def sce(base: Tensor, tuned: Sequence[Tensor], options: SceParameters) -> MergeResult:
    """Merge by SCE: the steps at the top of this module.

    Examples:
        >>> tuned = [torch.tensor([4.0, 1.0]), torch.tensor([-2.0, 2.0])]
        >>> sce(torch.zeros(2), tuned, SceParameters(weight=[1.0, 1.0], select_topk=0.5)).weight
        tensor([4., 0.])
    """
    selected = None
    if options.select_topk < 1 and len(tuned) > 1:  # one task has no variance to select by
        keep = partial(kept_count, options.select_topk)
        selection = recalled(("spread", options.select_topk), partial(spread_select, base, tuned, keep))
        selected = spread_mask(base, tuned, selection)
    squares = recalled(("squares", options.select_topk), partial(squared_norms, base, tuned, selected))
    weights = [own * user / (max(squares) or 1.0) for own, user in zip(squares, options.weight, strict=True)]
    total = sum(weights) or 1.0
    merged = add_erased_mean(base, tuned, selected, weights)
    return MergeResult(merged, TensorReport(weights=[weight / total for weight in weights]))


def squared_norms(base: Tensor, tuned: Sequence[Tensor], selected: Tensor | None) -> list[float]:
    """Return the squared norm of each task vector, of its selected elements alone if some are."""
    squares: list[float] = checked(task_gram(tuned, base=base, mask=selected).diagonal()).tolist()
    return squares


def add_erased_mean(base: Tensor, tuned: Sequence[Tensor], selected: Tensor | None, weights: Sequence[float]) -> Tensor:
    """Add the weighted mean of the selected elements that have the sign of their sum over the tasks."""
    sparsifiers = [Sparsifier(mask=selected)] * len(tuned)
    return elect_and_sum(base, tuned, weights, elect="unweighted", normalize=True, sparsifiers=sparsifiers)
