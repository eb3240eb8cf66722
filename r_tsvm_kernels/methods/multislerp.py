"""Multi-SLERP: the weighted mean direction of the task vectors, with their weighted mean length.

With the task vectors ``D_t = W_t - W_0``, or the models where there is no base, and weights of sum 1::

    W = W_0 + sum_t(w_t norm(D_t)) * m / norm(m),   m = sum_t(w_t D_t / norm(D_t))

Source: Goddard, https://goddard.blog/posts/multislerp-wow-what-a-cool-idea, 2025. Its steps also average in the tangent
space at m. There the weighted tangent vectors, projections on the complement of m, sum to 0 by definition of m: the
result is m itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from ..ops import elect_and_sum
from ..ops.elect_and_sum import normalized
from .base import FiniteFloat, MethodParameters, register
from .gram import cosines, geometric_cost, gram_matrix
from .reports import MergeResult, TensorReport


class MultiSlerpParameters(MethodParameters):
    """Parameters of `multislerp`."""

    normalize_weights: bool = Field(default=True, description="divide the weights by their sum")
    eps: FiniteFloat = Field(default=1e-8, ge=0, description="a mean direction shorter than this counts as none")
    relative: bool = Field(
        default=True, description="merge differences from the base; false (always without a base): the models"
    )

    def check_weights(self) -> None:
        """Refuse weights that sum to 0, with `normalize_weights`.

        Raises:
            ConfigError: they do.
        """
        if self.normalize_weights:
            normalized(self.weight, "set normalize_weights: false")


@register(
    "multislerp",
    pretty_name="Multi-SLERP",
    paper_url="https://goddard.blog/posts/multislerp-wow-what-a-cool-idea",
    parameters=MultiSlerpParameters,
    rounds=True,
    ops=("elect_and_sum", "task_gram"),
    needs_base=False,
    optional_base=True,
    aliases=("multi_slerp",),
    cost=geometric_cost,
)
def multislerp(
    base: Tensor, tuned: Sequence[Tensor], options: MultiSlerpParameters, out_dtype: torch.dtype | None = None
) -> MergeResult:
    """Merge by Multi-SLERP: the formula at the top of this module.

    The sum is linear if the directions cancel: all task vectors are zero, or they balance each other.

    Examples:
        >>> tuned = [torch.tensor([3.0, 0.0]), torch.tensor([0.0, 1.0])]
        >>> multislerp(torch.zeros(2), tuned, MultiSlerpParameters(weight=[1.0, 1.0])).weight  # length 2
        tensor([1.4142, 1.4142])
    """
    weights = (
        normalized(options.weight, "set normalize_weights: false")
        if options.normalize_weights
        else list(options.weight)
    )
    gram, w = (
        gram_matrix(tuned, base if options.relative else None),
        torch.tensor(weights, dtype=torch.float64, device="cpu"),
    )
    norms, directions = gram.diagonal().sqrt(), cosines(gram)
    length = float((w @ directions @ w).clamp(min=0).sqrt())
    if length > max(options.eps, 1e-7 * float(w.abs().sum())):  # float64 knows squares to 1e-16
        scale = float(w @ norms) / length
        weights = torch.where(norms > 0, scale * w / norms, 0).tolist()
    origin = base if options.relative else base.new_zeros(base.shape[-1:]).expand_as(base)
    return MergeResult(elect_and_sum(origin, tuned, weights, out_dtype=out_dtype), TensorReport(weights=weights))
