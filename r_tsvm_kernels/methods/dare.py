"""DARE: drop elements of the task vectors at random and rescale the others.

Each element of ``D_t = W_t - W_0`` is kept with probability `density` (mask 1, or 0) and divided by it::

    dare_linear:  W = W_0 + alpha * sum_t(w_t mask_t D_t / density_t)

`dare_ties` elects a sign for each element of ``mask_t D_t / density_t`` and sums as `ties` does.

Source: Yu et al., "Language Models are Super Mario", ICML 2024.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops import Sparsifier
from .base import register
from .reports import MergeResult
from .sparsify import SPARSE_OPS, RandomParameters, merge_kept, sparse_cost


def dare_masks(options: RandomParameters) -> list[Sparsifier]:
    """Keep each element with probability `density`, and multiply it by ``1 / density``: the mean does not change."""
    return [
        Sparsifier(keep_probability=density, rescale=1 / density if options.rescale and density else 1.0,
             seed=options.seed, substream=task)
        for task, density in enumerate(options.density)
    ]  # fmt: skip


@register(
    "dare_linear",
    pretty_name="DARE",
    paper_url="https://arxiv.org/abs/2311.03099",
    parameters=RandomParameters,
    rounds=True,
    ops=SPARSE_OPS,
    aliases=("dare", "dare_task_arithmetic"),
    cost=sparse_cost,
)
def dare_linear(
    base: Tensor, tuned: Sequence[Tensor], options: RandomParameters, out_dtype: torch.dtype | None = None
) -> MergeResult:
    """Return ``W_0 + alpha * sum(w_t mask_t D_t / density_t)``.

    Examples:
        >>> options = RandomParameters(weight=[1.0], density=[0.5], seed=3)
        >>> dare_linear(torch.zeros(6), [torch.ones(6)], options).weight
        tensor([0., 2., 0., 0., 2., 0.])
    """
    return merge_kept(base, tuned, options, dare_masks(options), "none", out_dtype)


@register(
    "dare_ties",
    pretty_name="DARE-TIES",
    paper_url="https://arxiv.org/abs/2311.03099",
    parameters=RandomParameters,
    rounds=True,
    elects=True,
    ops=SPARSE_OPS,
    aliases=("dare_ties_merging",),
    cost=sparse_cost,
)
def dare_ties(
    base: Tensor, tuned: Sequence[Tensor], options: RandomParameters, out_dtype: torch.dtype | None = None
) -> MergeResult:
    """Drop and rescale as `dare_linear`, then elect signs and sum as `ties`.

    Examples:
        >>> options = RandomParameters(weight=[1.0, 1.0], density=[0.5, 1.0], seed=3)
        >>> dare_ties(torch.zeros(6), [torch.ones(6), -torch.ones(6)], options).weight
        tensor([-1.,  2., -1., -1.,  2., -1.])
    """
    return merge_kept(base, tuned, options, dare_masks(options), "sum", out_dtype)
