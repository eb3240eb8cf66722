"""Task arithmetic, and the mean task vector that spectral methods use where there is no matrix."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field
from torch import Tensor

from ..ops import elect_and_sum, normalized
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
    row_wise=True,
)
def task_arithmetic(base: Tensor, tuned: Sequence[Tensor], options: TaskArithmeticParameters) -> MergeResult:
    """Return ``W_0 + alpha * sum(w_t D_t)`` with ``D_t = W_t - W_0`` (Ilharco et al., ICLR 2023)."""
    weights = normalized(options.weight) if options.normalize else list(options.weight)
    return MergeResult(elect_and_sum(base, tuned, weights, alpha=options.alpha), TensorReport(weights=weights))


def mean_task_vector(base: Tensor, tuned: Sequence[Tensor], weights: Sequence[float], alpha: float) -> MergeResult:
    """Return ``W_0 + alpha * mean(w_t D_t)``."""
    merged = elect_and_sum(base, tuned, [weight / len(tuned) for weight in weights], alpha=alpha)
    return MergeResult(merged, TensorReport(weights=list(weights)))
