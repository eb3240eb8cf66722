"""Weighted average of models (model soups)."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field
from torch import Tensor

from ..errors import ConfigError
from ..ops import elect_and_sum
from .base import MergeResult, MethodParameters, TensorReport, register


class LinearParameters(MethodParameters):
    """Parameters of `linear`."""

    normalize: bool = Field(default=True, description="divide by the sum of the weights")


@register(
    "linear",
    pretty_name="Linear (weighted average)",
    paper_url="https://arxiv.org/abs/2203.05482",
    parameters=LinearParameters,
    needs_base=False,
)
def linear(base: Tensor, tuned: Sequence[Tensor], options: LinearParameters) -> MergeResult:
    """Return ``sum(w_t W_t) / sum(w)``, or the plain sum without `normalize` (Wortsman et al., ICML 2022)."""
    total = sum(options.weight) if options.normalize else 1.0
    if abs(total) < 1e-8:
        raise ConfigError(f"linear: the weights {list(options.weight)} sum to 0; set normalize: false or other weights")
    weights = [weight / total for weight in options.weight]
    zeros = base.new_zeros(base.shape[-1:]).expand_as(base)  # one row stands for all
    return MergeResult(elect_and_sum(zeros, tuned, weights), TensorReport(weights=weights))
