"""Task arithmetic: the weighted sum of the task vectors ``D_t = W_t - W_0``.

::

    W = W_0 + alpha * sum_t(w_t D_t)

Source: Ilharco et al., "Editing Models with Task Arithmetic", ICLR 2023. `mean_task_vector` is the fallback of spectral
methods for tensors that are not matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from ..linalg import Factored, weighted_sum
from ..ops import add_update, elect_and_sum
from ..ops._checks import accumulation_dtype
from ..ops.elect_and_sum import normalized_shares
from .base import FiniteFloat, MethodParameters, always, register
from .reports import MergeResult, TensorReport


class TaskArithmeticParameters(MethodParameters):
    """Parameters of `task_arithmetic`."""

    alpha: FiniteFloat = Field(default=1.0, alias="lambda", description="scale of the merged task vector")
    normalize: bool = Field(default=False, description="divide by the sum of the weights")
    int8_mask: bool = Field(default=False, description="accepted in recipes and ignored: there is no mask")

    def check_weights(self) -> None:
        """Refuse weights that sum to 0, with `normalize`; weights that are all 0 keep the base.

        Raises:
            ConfigError: they do.
        """
        if self.normalize:
            normalized_shares(self.weight)


@register(
    "task_arithmetic",
    pretty_name="Task Arithmetic",
    paper_url="https://arxiv.org/abs/2212.04089",
    parameters=TaskArithmeticParameters,
    rounds=True,
    ops=("add_update", "elect_and_sum"),
    row_wise=True,
    factored=always,
)
def task_arithmetic(
    base: Tensor, tuned: Sequence[Any], options: TaskArithmeticParameters, out_dtype: torch.dtype | None = None
) -> MergeResult:
    """Return ``W_0 + alpha * sum(w_t D_t)``.

    Examples:
        >>> base, tuned = torch.ones(2), [torch.tensor([2.0, 1.0]), torch.tensor([1.0, 3.0])]
        >>> task_arithmetic(base, tuned, TaskArithmeticParameters(weight=[1.0, 1.0], alpha=0.5)).weight
        tensor([1.5000, 2.0000])
    """
    weights = normalized_shares(options.weight) if options.normalize else list(options.weight)
    if isinstance(tuned[0], Factored):
        merged = add_update(base, sum_of_updates(base, tuned, weights), options.alpha, out_dtype=out_dtype)
    else:
        merged = elect_and_sum(base, tuned, weights, alpha=options.alpha, out_dtype=out_dtype)
    return MergeResult(merged, TensorReport(weights=weights))


def sum_of_updates(base: Tensor, updates: Sequence[Factored], weights: Sequence[float]) -> Tensor:
    """Return ``sum(w_t D_t)`` as one product of all factors side by side."""
    total = weighted_sum(updates, weights)
    dtype = accumulation_dtype(base, *(update.left for update in updates))
    return total.left.to(dtype) @ total.right.to(dtype)


def mean_task_vector(
    base: Tensor,
    tuned: Sequence[Tensor],
    weights: Sequence[float],
    alpha: float,
    out_dtype: torch.dtype | None = None,
) -> MergeResult:
    """Return ``W_0 + alpha * mean(w_t D_t)``."""
    shares = [weight / len(tuned) for weight in weights]
    merged = elect_and_sum(base, tuned, shares, alpha=alpha, out_dtype=out_dtype)
    return MergeResult(merged, TensorReport(weights=list(weights)))
