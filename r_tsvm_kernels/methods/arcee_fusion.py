"""Arcee Fusion: takes over the elements of the model that are outliers of importance.

With ``D = W_1 - W_0``, and the rows w_1 and w_0 of an element::

    W = W_0 + [s >= median(s) + 1.5 (q_3(s) - q_1(s))] D
    s = abs(D) * KL(softmax(w_1) || softmax(w_0))

The divergence is between the rows of both models, as distributions, each plus 1e-8; q_1, the median and q_3 are the
elements of the sorted importance at the fractions 1/4, 1/2 and 3/4, rounded down. Other than in mergekit, all elements
are sorted, also of large tensors.

Source: mergekit, https://github.com/arcee-ai/mergekit, 2025.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from ..ops import Sparsifier, elect_and_sum, magnitude_select
from ..ops._checks import accumulation_dtype, tile_elements
from .base import Cost, TensorJob, Unweighted, register
from .reports import MergeResult, TensorReport

EPSILON, FRACTIONS, RANGES = 1e-8, (0.25, 0.5, 0.75), 1.5


class ArceeFusionParameters(Unweighted):
    """Parameters of `arcee_fusion`: none."""


def fusion_cost(job: TensorJob, options: Any) -> Cost:
    """Return the cost of `arcee_fusion`: importance, its selection, a mask, and some rows in float64."""
    columns = job.shape[-1] if job.shape else 1
    rows = 8 * 8 * max(columns, min(job.elements, tile_elements(job.device_type)))
    by_reference = dispatch.by_reference(job.device_type, "magnitude_select", "elect_and_sum")
    copies = 8 * job.itemsize + 34 if by_reference else 2 * job.itemsize + 9
    return Cost(copies * job.elements + rows, 24.0 * job.elements)


@register(
    "arcee_fusion",
    pretty_name="Arcee Fusion",
    paper_url="https://github.com/arcee-ai/mergekit",
    parameters=ArceeFusionParameters,
    ops=("elect_and_sum", "magnitude_select"),
    tasks=1,
    cost=fusion_cost,
)
def arcee_fusion(base: Tensor, tuned: Sequence[Tensor], options: ArceeFusionParameters) -> MergeResult:
    """Merge by Arcee Fusion: the formula at the top of this module.

    Examples:
        >>> model = torch.tensor([[0.1, 0.0, 0.0, 0.0], [3.0, 0.0, 0.0, 0.0]])
        >>> arcee_fusion(torch.zeros(2, 4), [model], ArceeFusionParameters()).weight[1]
        tensor([3., 0., 0., 0.])
    """
    scores = importance(base, tuned[0])
    places = [scores.numel() - int(fraction * (scores.numel() - 1)) for fraction in FRACTIONS]
    low, median, high = (float(found.threshold) for found in magnitude_select(scores, places))
    chosen = scores >= median + RANGES * (high - low)
    merged = elect_and_sum(base, tuned, [1.0], sparsifiers=[Sparsifier(mask=chosen)])
    return MergeResult(merged, TensorReport(weights=[1.0]))


def importance(base: Tensor, model: Tensor) -> Tensor:
    """Return the importance of each element, in the dtype of the merge; computed in float64, some rows at a time."""
    dtype = accumulation_dtype(base, model)
    columns = base.shape[-1] if base.ndim else 1
    found = torch.empty(base.shape, dtype=dtype, device=base.device)
    rows = [tensor.reshape(-1, columns) for tensor in (base, model, found)]
    height = max(1, tile_elements(base.device.type) // columns)
    for first in range(0, len(rows[0]), height):
        start, tuned, out = (tensor[first : first + height] for tensor in rows)
        old, new = start.double(), tuned.double()
        q, p = old.softmax(-1).add_(EPSILON), new.softmax(-1).add_(EPSILON)
        divergence = (p * (p / q).log_()).sum(-1, keepdim=True).clamp_(min=0)
        scores = (new - old).abs_().mul_(divergence)  # float64 inputs are not copied
        out.copy_(scores.clamp_(max=math.sqrt(torch.finfo(dtype).max)))
    return found
