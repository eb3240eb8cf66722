"""TIES-Merging: trim, elect a sign, average those that have it."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field
from torch import Tensor

from .base import MergeResult, register
from .sparsify import SparseParameters, largest_kept, merge_kept, rescaled, sparse_cost


class TiesParameters(SparseParameters):
    """Parameters of `ties`."""

    normalize: bool = Field(default=True, description="divide by the weights of those that have the elected sign")


@register(
    "ties",
    pretty_name="TIES",
    paper_url="https://arxiv.org/abs/2306.01708",
    parameters=TiesParameters,
    aliases=("ties_merging",),
    cost=sparse_cost,
)
def ties(base: Tensor, tuned: Sequence[Tensor], options: TiesParameters) -> MergeResult:
    """Trim each task vector to its largest magnitudes, then take the disjoint mean of those of the elected sign.

    The sign of an element is that of the weighted sum of the trimmed task vectors (Yadav et al., NeurIPS 2023).
    """
    sparsifiers = [largest_kept(base, tensor, density) for tensor, density in zip(tuned, options.density, strict=True)]
    if options.rescale:
        sparsifiers = [rescaled(base, tensor, own) for tensor, own in zip(tuned, sparsifiers, strict=True)]
    return merge_kept(base, tuned, options, sparsifiers, "sum")
