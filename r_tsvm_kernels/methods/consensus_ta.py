"""Consensus Task Arithmetic: the sum of the task vectors where it serves several tasks.

1. Sum: ``tau = sum_t(w_t D_t)`` of the task vectors ``D_t = W_t - W_0``.
2. TALL mask of each task, element by element: ``m_t = [|w_t D_t| >= lambda_t |tau - w_t D_t|]``.
3. Keep the elements that at least k tasks need; with k = 2, none that serves one task alone (selfish) or no task
   (catastrophic)::

       W = W_0 + alpha * [sum_t(m_t) >= k] tau

Source: Wang et al., "Localizing Task Information for Improved Model Merging and Compression", ICML 2024, sections 3.2
and 4.2. The authors choose each lambda_t among 0.2, 0.3 .. 0.6 by validation data; the default is the middle. Their
code has > in place of >=, and keeps nothing where k is above the number of tasks; here k is at most that number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from .. import dispatch
from ..ops import add_update
from ..ops._checks import accumulation_dtype, tile_elements
from .base import Cost, FiniteFloat, MethodParameters, PerModel, TensorJob, register
from .reports import MergeResult, TensorReport

NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class ConsensusParameters(MethodParameters):
    """Parameters of `consensus_ta`."""

    tall_lambda: PerModel[NotNegative] = Field(
        default=(0.4,), description="threshold of each model's mask; a larger one keeps fewer elements"
    )
    consensus_threshold: int = Field(
        default=2, ge=0, description="number of models that must need an element; at most all"
    )
    alpha: FiniteFloat = Field(default=1.0, alias="lambda", description="scale of the merged task vector")


def consensus_cost(job: TensorJob, options: ConsensusParameters) -> Cost:
    """Return the cost of `consensus_ta`: the kept sum, the addition, and one tile of all task vectors in float64."""
    adding = 5 * job.itemsize + 1 if dispatch.by_reference(job.device_type, "add_update") else 2 * job.itemsize
    tile = min(tile_elements(job.device_type), job.elements)
    per_element = (job.itemsize + adding) * job.elements
    return Cost(per_element + 8 * (job.tasks + 8) * tile, (6.0 * job.tasks + 4) * job.elements)


@register(
    "consensus_ta",
    pretty_name="Consensus TA",
    paper_url="https://arxiv.org/abs/2405.07813",
    parameters=ConsensusParameters,
    rounds=True,
    ops=("add_update", "elect_and_sum"),
    row_wise=True,
    aliases=("consensus", "tall_mask"),
    cost=consensus_cost,
)
def consensus_ta(
    base: Tensor, tuned: Sequence[Tensor], options: ConsensusParameters, out_dtype: torch.dtype | None = None
) -> MergeResult:
    """Merge by Consensus TA: the steps at the top of this module.

    Examples:
        >>> tuned = [torch.tensor([4.0, 1.0]), torch.tensor([0.0, 2.0])]
        >>> consensus_ta(torch.zeros(2), tuned, ConsensusParameters(weight=[1.0] * 2, tall_lambda=[0.4] * 2)).weight
        tensor([0., 3.])
    """
    kept = torch.zeros(base.shape, dtype=accumulation_dtype(base, *tuned), device=base.device)
    out, origin, *models = (tensor.reshape(-1) for tensor in (kept, base, *tuned))
    size, least = tile_elements(base.device.type), min(options.consensus_threshold, len(tuned))
    for first in range(0, len(origin), size):  # piece by piece, so that no task vector is stored whole
        part = slice(first, first + size)
        start = origin[part].double()
        deltas = [(model[part].double() - start) * own for model, own in zip(models, options.weight, strict=True)]
        total = sum(deltas[1:], deltas[0])
        needing = torch.zeros_like(total, dtype=torch.int32)
        for delta, threshold in zip(deltas, options.tall_lambda, strict=True):
            needing += delta.abs() >= threshold * (total - delta).abs()
        out[part] = total.masked_fill_(needing < least, 0)
    return MergeResult(
        add_update(base, kept, options.alpha, out_dtype=out_dtype), TensorReport(weights=list(options.weight))
    )
