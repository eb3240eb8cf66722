"""Weighted average of models (model soups)."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field
from torch import Tensor

from ..ops import elect_and_sum, normalized
from .base import MergeResult, MethodParameters, TensorReport, register


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
)
def linear(base: Tensor, tuned: Sequence[Tensor], options: LinearParameters) -> MergeResult:
    """Return ``sum(w_t W_t) / sum(w)``, or the plain sum without `normalize` (Wortsman et al., ICML 2022)."""
    weights = normalized(options.weight) if options.normalize else list(options.weight)
    zeros = base.new_zeros(base.shape[-1:]).expand_as(base)  # one row stands for all
    return MergeResult(elect_and_sum(zeros, tuned, weights), TensorReport(weights=weights))
