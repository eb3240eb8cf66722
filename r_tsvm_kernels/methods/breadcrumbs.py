"""Model Breadcrumbs: drop the small elements of the task vectors, and the few largest.

Of the N elements of ``D_t = W_t - W_0``, by magnitude, mask_t drops the ``floor(gamma * N)`` largest and keeps the next
``ceil(density * N)``::

    breadcrumbs:  W = W_0 + alpha * sum_t(w_t mask_t D_t)

`breadcrumbs_ties` elects a sign for each element of ``mask_t D_t`` and sums as `ties` does.

Source: Davari and Belilovsky, "Model Breadcrumbs", ECCV 2024.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import torch
from pydantic import Field
from torch import Tensor

from ..ops import Sparsifier, kept_count
from .base import PerModel, register
from .reports import MergeResult
from .sparsify import SPARSE_OPS, Share, SparseParameters, largest_kept, merge_kept, sparse_cost


class BreadcrumbsParameters(SparseParameters):
    """Parameters of `breadcrumbs` and `breadcrumbs_ties`."""

    gamma: PerModel[Share] = Field(default=(0.01,), description="fraction of the largest magnitudes that is dropped")


def breadcrumbs_masks(base: Tensor, tuned: Sequence[Tensor], options: BreadcrumbsParameters) -> list[Sparsifier]:
    """Drop the ``floor(gamma * n)`` largest magnitudes, keep the next ``ceil(density * n)``.

    If both do not fit, fewer of the largest are dropped.
    """
    numel = base.numel()
    dropped = [
        min(math.floor(Fraction(repr(gamma)) * numel), numel - kept_count(density, numel))
        for density, gamma in zip(options.density, options.gamma, strict=True)
    ]
    return largest_kept(base, tuned, options, dropped)


@register(
    "breadcrumbs",
    pretty_name="Model Breadcrumbs",
    paper_url="https://arxiv.org/abs/2312.06795",
    parameters=BreadcrumbsParameters,
    rounds=True,
    ops=SPARSE_OPS,
    cost=sparse_cost,
)
def breadcrumbs(
    base: Tensor, tuned: Sequence[Tensor], options: BreadcrumbsParameters, out_dtype: torch.dtype | None = None
) -> MergeResult:
    """Return ``W_0 + alpha * sum(w_t mask_t D_t)``.

    Examples:
        >>> options = BreadcrumbsParameters(weight=[1.0], density=[0.5], gamma=[0.25])
        >>> breadcrumbs(torch.zeros(4), [torch.tensor([8.0, 1.0, 4.0, 2.0])], options).weight
        tensor([0., 0., 4., 2.])
    """
    return merge_kept(base, tuned, options, breadcrumbs_masks(base, tuned, options), "none", out_dtype)


@register(
    "breadcrumbs_ties",
    pretty_name="Model Breadcrumbs with TIES",
    paper_url="https://arxiv.org/abs/2312.06795",
    parameters=BreadcrumbsParameters,
    rounds=True,
    elects=True,
    ops=SPARSE_OPS,
    cost=sparse_cost,
)
def breadcrumbs_ties(
    base: Tensor, tuned: Sequence[Tensor], options: BreadcrumbsParameters, out_dtype: torch.dtype | None = None
) -> MergeResult:
    """Mask as `breadcrumbs`, then elect signs and sum as `ties`.

    Examples:
        >>> tuned = [torch.tensor([8.0, 1.0, 4.0, 2.0]), torch.tensor([9.0, 0.0, -1.0, 5.0])]
        >>> options = BreadcrumbsParameters(weight=[1.0, 1.0], density=[0.5, 0.5], gamma=[0.25, 0.25])
        >>> breadcrumbs_ties(torch.zeros(4), tuned, options).weight
        tensor([0., 0., 4., 7.])
    """
    return merge_kept(base, tuned, options, breadcrumbs_masks(base, tuned, options), "sum", out_dtype)
