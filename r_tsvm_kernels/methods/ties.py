"""TIES-Merging: trim, elect a sign, average the values of that sign.

1. Trim: D'_t holds the ``ceil(density * N)`` largest magnitudes of the N elements of ``D_t = W_t - W_0``.
2. Elect: ``s = sign(sum_t(w_t D'_t))``, element by element.
3. Merge::

       W = W_0 + alpha * sum_t(w_t [sign(D'_t) = s] D'_t) / sum_t(w_t [sign(D'_t) = s])

   Without `normalize` the numerator alone.

Source: Yadav et al., "TIES-Merging", NeurIPS 2023.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from .base import register
from .reports import MergeResult
from .sparsify import SPARSE_OPS, SparseParameters, largest_kept, merge_kept, sparse_cost


class TiesParameters(SparseParameters):
    """Parameters of `ties`."""

    normalize: bool = Field(default=True, description="divide by the weights of the tasks with the elected sign")


@register(
    "ties",
    pretty_name="TIES",
    paper_url="https://arxiv.org/abs/2306.01708",
    parameters=TiesParameters,
    rounds=True,
    elects=True,
    ops=SPARSE_OPS,
    aliases=("ties_merging",),
    cost=sparse_cost,
)
def ties(
    base: Tensor, tuned: Sequence[Tensor], options: TiesParameters, out_dtype: torch.dtype | None = None
) -> MergeResult:
    """Merge by TIES: the steps at the top of this module.

    Examples:
        >>> tuned = [torch.tensor([4.0, 1.0]), torch.tensor([-1.0, 3.0])]
        >>> ties(torch.zeros(2), tuned, TiesParameters(weight=[1.0, 1.0], density=[1.0, 0.5])).weight
        tensor([4., 2.])
    """
    return merge_kept(base, tuned, options, largest_kept(base, tuned, options), "sum", out_dtype)
