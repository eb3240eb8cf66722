"""DELLA: drop elements at random, small magnitudes more likely than large ones.

In each row of ``D_t = W_t - W_0``, the probability p of keeping an element rises linearly with the rank of its
magnitude, from ``density - epsilon`` to ``density + epsilon`` (MAGPRUNE). Kept elements are divided by p::

    della_linear:  W = W_0 + alpha * sum_t(w_t mask_t D_t / p_t)

`della` elects a sign for each element of ``mask_t D_t / p_t`` and averages as `ties` does.

Source: Deep et al., "DELLA-Merging", arXiv 2406.11617.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from .. import dispatch
from ..ops import Election, RankedSparsifier, Sparsifier, della_probabilities, magnitude_ranks, ranked_mask
from .base import Cost, FiniteFloat, MethodParameters, PerModel, TensorJob, register
from .reports import MergeResult
from .sparsify import SPARSE_OPS, RandomParameters, merge_kept, sparse_cost

# Elements whose ranks are in memory at a time: on a CPU, so many that malloc takes the same memory again.
_PIECE = {"cpu": 1 << 20, "cuda": 1 << 22}


class DellaLinearParameters(RandomParameters):
    """Parameters of `della_linear`."""

    epsilon: PerModel[FiniteFloat] = Field(
        default=(0.15,), description="probabilities of being kept: from density - epsilon to density + epsilon"
    )

    def for_tensor(self, name: str) -> MethodParameters:
        """Set the seed as all random methods do, and refuse probabilities out of range before tensors are read."""
        for density, epsilon in zip(self.density, self.epsilon, strict=True):
            if 0 < density < 1:
                della_probabilities(1, density, epsilon)
        return super().for_tensor(name)


class DellaParameters(DellaLinearParameters):
    """Parameters of `della`."""

    normalize: bool = Field(default=True, description="divide by the weights of the tasks with the elected sign")


def della_masks(
    base: Tensor, tuned: Sequence[Tensor], options: DellaLinearParameters, first: int = 0
) -> list[Sparsifier]:
    """Drop elements by MAGPRUNE: in each row the probability of being kept rises with the rank of the magnitude.

    Without `rescale`, `first` must be 0. Otherwise it is the index of the first element, if these are only some rows.
    """
    sparsifiers = []
    for task, (tensor, density, epsilon) in enumerate(zip(tuned, options.density, options.epsilon, strict=True)):
        if not 0 < density < 1:
            sparsifiers.append(Sparsifier(keep_probability=density))
            continue
        probabilities = della_probabilities(base.shape[-1], density, epsilon)
        if options.rescale:
            ranked = RankedSparsifier(magnitude_ranks(tensor, base=base), probabilities)
            sparsifiers.append(Sparsifier(ranked=ranked, seed=options.seed, substream=task, first=first))
        else:
            mask = ranked_mask(tensor, probabilities, seed=options.seed, substream=task, base=base)
            sparsifiers.append(Sparsifier(mask=mask))
    return sparsifiers


def della_cost(job: TensorJob, options: DellaLinearParameters) -> Cost:
    """Return the cost of DELLA: that of sparsifying, and the ranks or masks of every task."""
    common = sparse_cost(job, options)
    sorting = 80 if dispatch.by_reference(job.device_type, "magnitude_ranks", "ranked_mask") else 1
    elements, each = job.elements, (4 if options.rescale else 1) * job.tasks + sorting
    if options.rescale and len(job.shape) > 1:
        per_row = job.elements // max(1, job.shape[0])
        elements = min(elements, rows_of_piece(per_row, job.device_type) * per_row)
        each += job.summed  # of the piece
    return Cost(common.bytes + each * elements, common.flops + 60.0 * job.tasks * job.elements)


def _merge_ranked(
    base: Tensor,
    tuned: Sequence[Tensor],
    options: DellaLinearParameters,
    elect: Election,
    out_dtype: torch.dtype | None,
) -> MergeResult:
    shape = base.shape or (1,)  # a scalar is a row
    rows, tuned_rows = base.view(shape), [tensor.view(shape) for tensor in tuned]
    per_row = base.numel() // max(1, len(rows))
    height = rows_of_piece(per_row, base.device.type) if options.rescale and base.ndim > 1 else len(rows)
    if height >= len(rows):
        result = merge_kept(rows, tuned_rows, options, della_masks(rows, tuned_rows, options), elect, out_dtype)
        result.weight = result.weight.view(base.shape)
        return result
    merged: Tensor | None = None
    for first in range(0, len(rows), height):
        origin, models = rows[first : first + height], [tensor[first : first + height] for tensor in tuned_rows]
        masks = della_masks(origin, models, options, first * per_row)
        result = merge_kept(origin, models, options, masks, elect, out_dtype)
        merged = result.weight.new_empty(shape) if merged is None else merged
        merged[first : first + height] = result.weight
    assert merged is not None
    result.weight = merged
    return result


def rows_of_piece(per_row: int, device_type: str) -> int:
    """Return how many rows are ranked at a time. Ranks take twice the memory of weights in bfloat16.

    A piece begins at a multiple of four elements, as random masks need it.

    Examples:
        >>> rows_of_piece(4096, "cuda"), rows_of_piece(4096, "cpu"), rows_of_piece(3, "cpu")
        (1024, 256, 349524)
    """
    unit = 4 // math.gcd(4, max(1, per_row))
    return max(1, _PIECE[device_type] // max(1, per_row) // unit) * unit


@register(
    "della_linear",
    pretty_name="DELLA",
    paper_url="https://arxiv.org/abs/2406.11617",
    parameters=DellaLinearParameters,
    rounds=True,
    ops=(*SPARSE_OPS, "magnitude_ranks", "ranked_mask"),
    cost=della_cost,
)
def della_linear(
    base: Tensor, tuned: Sequence[Tensor], options: DellaLinearParameters, out_dtype: torch.dtype | None = None
) -> MergeResult:
    """Return ``W_0 + alpha * sum(w_t mask_t D_t / p_t)``.

    Examples:
        >>> options = DellaLinearParameters(weight=[1.0], density=[0.5], epsilon=[0.5], seed=7)
        >>> della_linear(torch.zeros(5), [torch.tensor([1.0, 4.0, 2.0, 3.0, 5.0])], options).weight
        tensor([0., 0., 8., 6., 5.])
    """
    return _merge_ranked(base, tuned, options, "none", out_dtype)


@register(
    "della",
    pretty_name="DELLA-TIES",
    paper_url="https://arxiv.org/abs/2406.11617",
    parameters=DellaParameters,
    rounds=True,
    elects=True,
    ops=(*SPARSE_OPS, "magnitude_ranks", "ranked_mask"),
    aliases=("della_ties",),
    cost=della_cost,
)
def della(
    base: Tensor, tuned: Sequence[Tensor], options: DellaParameters, out_dtype: torch.dtype | None = None
) -> MergeResult:
    """Drop and rescale as `della_linear`, then elect signs and average as `ties`.

    Examples:
        >>> options = DellaParameters(weight=[1.0, 1.0], density=[0.5, 1.0], epsilon=[0.5, 0.0], seed=7)
        >>> tuned = [torch.tensor([1.0, 4.0, 2.0, 3.0, 5.0]), torch.full((5,), -2.0)]
        >>> della(torch.zeros(5), tuned, options).weight
        tensor([-2., -2.,  8.,  6.,  5.])
    """
    return _merge_ranked(base, tuned, options, "sum", out_dtype)
