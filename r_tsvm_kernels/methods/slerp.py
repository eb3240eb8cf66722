"""SLERP: from the base to a model along the great circle.

With the angle a between the base W_0 and the model W_1::

    W = (sin((1 - t) a) W_0 + sin(t a) W_1) / sin(a)

Source: Shoemake, "Animating rotation with quaternion curves", SIGGRAPH 1985.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from ..ops import elect_and_sum
from .base import FiniteFloat, Unweighted, register
from .gram import cosines, geometric_cost, gram_matrix
from .reports import MergeResult, TensorReport


class SlerpParameters(Unweighted):
    """Parameters of `slerp`."""

    t: FiniteFloat = Field(default=0.5, description="0 is the base, 1 the model")


@register(
    "slerp",
    pretty_name="SLERP",
    paper_url="https://en.wikipedia.org/wiki/Slerp",
    parameters=SlerpParameters,
    rounds=True,
    ops=("elect_and_sum", "task_gram"),
    tasks=1,
    cost=geometric_cost,
)
def slerp(
    base: Tensor, tuned: Sequence[Tensor], options: SlerpParameters, out_dtype: torch.dtype | None = None
) -> MergeResult:
    """Merge by SLERP: the formula at the top of this module.

    The interpolation is linear if there is no great circle: one tensor is zero, or a multiple of the other.

    Examples:
        >>> slerp(torch.tensor([1.0, 0.0]), [torch.tensor([0.0, 1.0])], SlerpParameters(t=0.5)).weight
        tensor([0.7071, 0.7071])
    """
    gram = gram_matrix([base, tuned[0]])
    angle = math.acos(float(cosines(gram)[0, 1]))
    if math.sin(angle) > 1e-7 and float(gram.diagonal().min()) > 0:
        first = math.sin((1 - options.t) * angle) / math.sin(angle)
        second = math.sin(options.t * angle) / math.sin(angle)
    else:
        first, second = 1 - options.t, options.t
    # As an update of the base, so that small differences are not lost; the task vector of 0 is minus the base.
    zero = base.new_zeros(base.shape[-1:]).expand_as(base)
    merged = elect_and_sum(base, [tuned[0], zero], [second, 1 - first - second], out_dtype=out_dtype)
    return MergeResult(merged, TensorReport(weights=[second]))
