"""Passthrough: the values of one model, to assemble a model from the layers of others.

::

    W = scale W_1

Source: mergekit, https://github.com/arcee-ai/mergekit. Layers of several models make "frankenmerges"; repeated layers
are depth up-scaling (Kim et al., "SOLAR 10.7B", arXiv 2312.15166).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from ..ops import elect_and_sum
from .base import FiniteFloat, PerModel, Unweighted, register
from .reports import MergeResult, TensorReport


class PassthroughParameters(Unweighted):
    """Parameters of `passthrough`."""

    scale: PerModel[FiniteFloat] = Field(default=(1.0,), description="factor of the values; 1 copies them")


def unscaled(options: Any) -> bool:
    """Whether the values stay as they are."""
    return bool(options.scale == (1.0,))


@register(
    "passthrough",
    pretty_name="Passthrough",
    paper_url="https://arxiv.org/abs/2312.15166",
    parameters=PassthroughParameters,
    rounds=True,
    ops=("elect_and_sum",),
    needs_base=False,
    row_wise=True,
    tasks=1,
    copies=unscaled,
)
def passthrough(
    base: Tensor, tuned: Sequence[Tensor], options: PassthroughParameters, out_dtype: torch.dtype | None = None
) -> MergeResult:
    """Return the values of the model, times `scale`.

    Examples:
        >>> passthrough(torch.zeros(2), [torch.tensor([2.0, 3.0])], PassthroughParameters(scale=0.5)).weight
        tensor([1.0000, 1.5000])
    """
    zeros = base.new_zeros(base.shape[-1:]).expand_as(base)
    weights = list(options.scale)
    return MergeResult(elect_and_sum(zeros, tuned, weights, out_dtype=out_dtype), TensorReport(weights=weights))
