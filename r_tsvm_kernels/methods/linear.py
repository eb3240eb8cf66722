"""Weighted average of the models W_t (model soups).

::

    W = sum_t(w_t W_t) / sum_t(w_t)

Source: Wortsman et al., "Model soups", ICML 2022.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from ..linalg import Factored
from ..ops import add_update, elect_and_sum
from ..ops.elect_and_sum import normalized
from .base import MethodParameters, always, register
from .reports import MergeResult, TensorReport
from .task_arithmetic import sum_of_updates


class LinearParameters(MethodParameters):
    """Parameters of `linear`."""

    normalize: bool = Field(default=True, description="divide by the sum of the weights")

    def check_weights(self) -> None:
        """Refuse weights that sum to 0, with `normalize`.

        Raises:
            ConfigError: they do.
        """
        if self.normalize:
            normalized(self.weight)


@register(
    "linear",
    pretty_name="Linear (weighted average)",
    paper_url="https://arxiv.org/abs/2203.05482",
    parameters=LinearParameters,
    rounds=True,
    ops=("add_update", "elect_and_sum"),
    aliases=("simple_average", "weighted_average", "rewarded_soup"),
    needs_base=False,
    row_wise=True,
    factored=always,
)
def linear(
    base: Tensor, tuned: Sequence[Any], options: LinearParameters, out_dtype: torch.dtype | None = None
) -> MergeResult:
    """Return the weighted average, or the weighted sum without `normalize`.

    Examples:
        >>> tuned = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 2.0])]
        >>> linear(torch.zeros(2), tuned, LinearParameters(weight=[1.0, 3.0])).weight
        tensor([2.5000, 2.0000])
    """
    weights = normalized(options.weight) if options.normalize else list(options.weight)
    if isinstance(tuned[0], Factored):
        update = sum_of_updates(base, tuned, weights)
        if not options.normalize:  # then the base counts as often as the weights say
            update.add_(base, alpha=sum(weights) - 1)
        return MergeResult(add_update(base, update, out_dtype=out_dtype), TensorReport(weights=weights))
    zeros = base.new_zeros(base.shape[-1:]).expand_as(base)  # expanded from one row
    return MergeResult(elect_and_sum(zeros, tuned, weights, out_dtype=out_dtype), TensorReport(weights=weights))
