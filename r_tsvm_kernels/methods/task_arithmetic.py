"""Task arithmetic, and the mean task vector that spectral methods use where there is no matrix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from ..errors import ConfigError
from ..ops import accumulation_dtype, add_update
from .base import FiniteFloat, MergeResult, MethodParameters, TensorReport, register


class TaskArithmeticParameters(MethodParameters):
    """Parameters of `task_arithmetic`."""

    alpha: FiniteFloat = Field(default=1.0, alias="lambda", description="scale of the merged task vector")
    normalize: bool = Field(default=False, description="divide by the sum of the weights")
    int8_mask: bool = Field(default=False, description="accepted in recipes; changes nothing, there is no mask")


@register(
    "task_arithmetic",
    pretty_name="Task Arithmetic",
    paper_url="https://arxiv.org/abs/2212.04089",
    parameters=TaskArithmeticParameters,
)
def task_arithmetic(base: Tensor, tuned: Sequence[Tensor], options: TaskArithmeticParameters) -> MergeResult:
    """Return ``W_0 + alpha * sum(w_t D_t)`` with ``D_t = W_t - W_0`` (Ilharco et al., ICLR 2023)."""
    total = sum(options.weight) if options.normalize else 1.0
    if abs(total) < 1e-8:
        raise ConfigError(f"task_arithmetic: the weights {list(options.weight)} sum to 0; do not normalize them")
    weights = [weight / total for weight in options.weight]
    update = weighted_task_vectors(base, tuned, weights)
    return MergeResult(add_update(base, update, options.alpha), TensorReport(weights=weights))


def mean_task_vector(base: Tensor, tuned: Sequence[Tensor], weights: Sequence[float], alpha: float) -> MergeResult:
    """Return ``W_0 + alpha * mean(w_t D_t)``."""
    update = weighted_task_vectors(base, tuned, [weight / len(tuned) for weight in weights])
    return MergeResult(add_update(base, update, alpha), TensorReport(weights=list(weights)))


def weighted_task_vectors(base: Tensor, tuned: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return ``sum(w_t D_t)``, float32 or float64."""
    dtype = accumulation_dtype(base, *tuned)
    update = torch.zeros_like(base, dtype=dtype)
    for weight, tensor in zip(weights, tuned, strict=True):
        update.add_(tensor.to(dtype) - base.to(dtype), alpha=weight)
    return update
