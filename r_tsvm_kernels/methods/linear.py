"""Weighted average of models (model soups)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import Field
from torch import Tensor

from ..linalg import Factored
from ..ops import add_update, elect_and_sum, normalized
from .base import MergeResult, MethodParameters, TensorReport, always, register
from .task_arithmetic import sum_of_updates


class LinearParameters(MethodParameters):
    """Parameters of `linear`."""

    normalize: bool = Field(default=True, description="divide by the sum of the weights")


@register(
    "linear",
    pretty_name="Linear (weighted average)",
    paper_url="https://arxiv.org/abs/2203.05482",
    parameters=LinearParameters,
    aliases=("simple_average", "weighted_average", "rewarded_soup"),
    needs_base=False,
    row_wise=True,
    factored=always,
)
def linear(base: Tensor, tuned: Sequence[Any], options: LinearParameters) -> MergeResult:
    """Return ``sum(w_t W_t) / sum(w)``, or the plain sum without `normalize` (Wortsman et al., ICML 2022)."""
    weights = normalized(options.weight) if options.normalize else list(options.weight)
    if isinstance(tuned[0], Factored):
        update = sum_of_updates(base, tuned, weights)
        if not options.normalize:  # then the base is there as often as the weights say
            update.add_(base, alpha=sum(weights) - 1)
        return MergeResult(add_update(base, update), TensorReport(weights=weights))
    zeros = base.new_zeros(base.shape[-1:]).expand_as(base)  # one row stands for all
    return MergeResult(elect_and_sum(zeros, tuned, weights), TensorReport(weights=weights))
