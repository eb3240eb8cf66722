"""Model Stock: the mean of few fine-tunes, moved towards the base by the angle between them.

With the mean cosine c of all pairs of the T task vectors ``D_t = W_t - W_0``, at least 0::

    W = t * mean_t(W_t) + (1 - t) * W_0,   t = T c / (1 + (T - 1) c)

Source: Jang et al., "Model Stock: All we need is just a few fine-tuned models", ECCV 2024. `weight` weights the mean.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from ..ops import add_update, elect_and_sum
from ..ops._checks import accumulation_dtype
from ..ops.elect_and_sum import normalized
from .base import Cost, MethodParameters, TensorJob, register
from .gram import cosines, geometric_cost, gram_matrix, row_grams
from .reports import MergeResult, TensorReport


class ModelStockParameters(MethodParameters):
    """Parameters of `model_stock`."""

    filter_wise: bool = Field(default=False, description="an angle for each row instead of one for the tensor")

    def check_weights(self) -> None:
        """Refuse weights that sum to 0.

        Raises:
            ConfigError: they do.
        """
        normalized(self.weight, "choose others")


def interpolation_ratio(gram: Tensor) -> Tensor:
    """Return ``t = T c / (1 + (T - 1) c)`` from the Gram matrix (..., T, T) of the task vectors.

    It is between 0 and 1: a negative mean cosine counts as 0, because the formula has a pole there. A single task
    vector has t = 1.

    Examples:
        >>> interpolation_ratio(torch.tensor([[1.0, 0.5], [0.5, 1.0]]))
        tensor(0.6667)
    """
    tasks = gram.shape[-1]
    first, second = torch.triu_indices(tasks, tasks, offset=1, device=gram.device)
    if tasks == 1:
        return torch.ones_like(gram[..., 0, 0])
    cosine = cosines(gram)[..., first, second].mean(-1).clamp(min=0)
    return tasks * cosine / (1 + (tasks - 1) * cosine)


def model_stock_cost(job: TensorJob, options: ModelStockParameters) -> Cost:
    """Return the cost of `model_stock`; the row-wise sum stores the update."""
    whole = geometric_cost(job, options)
    return Cost(whole.bytes + 6 * job.itemsize * job.elements, whole.flops) if options.filter_wise else whole


@register(
    "model_stock",
    pretty_name="Model Stock",
    paper_url="https://arxiv.org/abs/2403.19522",
    parameters=ModelStockParameters,
    rounds=True,
    ops=("add_update", "elect_and_sum", "task_gram"),
    cost=model_stock_cost,
)
def model_stock(
    base: Tensor, tuned: Sequence[Tensor], options: ModelStockParameters, out_dtype: torch.dtype | None = None
) -> MergeResult:
    """Merge by Model Stock: the formula at the top of this module, for the tensor or for each of its rows."""
    weights = normalized(options.weight, "choose others")
    if not options.filter_wise or base.ndim < 2:
        ratio = float(interpolation_ratio(gram_matrix(tuned, base)))
        merged = elect_and_sum(base, tuned, weights, alpha=ratio, out_dtype=out_dtype)
        return MergeResult(merged, TensorReport(weights=[ratio * weight for weight in weights]))
    ratios = interpolation_ratio(row_grams(tuned, base))
    mean_ratio = float(ratios.mean())
    merged = add_row_wise(base, tuned, weights, ratios, out_dtype)
    return MergeResult(merged, TensorReport(weights=[mean_ratio * weight for weight in weights]))


def add_row_wise(
    base: Tensor,
    tuned: Sequence[Tensor],
    weights: Sequence[float],
    ratios: Tensor,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Return the base and the weighted sum of the task vectors, each row (along the last dimension) times its ratio."""
    dtype = accumulation_dtype(base, *tuned)
    update = torch.zeros_like(base, dtype=dtype, memory_format=torch.contiguous_format)
    for weight, tensor in zip(weights, tuned, strict=True):
        update.add_(tensor.to(dtype) - base.to(dtype), alpha=weight)
    update.view(-1, base.shape[-1]).mul_(ratios.to(dtype)[:, None])
    return add_update(base, update, out_dtype=out_dtype)
