"""Sparsifying, electing and summing in torch: the definition of correct."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._checks import accumulation_dtype
from ..random_mask import mask_threshold
from ..random_mask.reference import random_words
from . import Sparsifier, least_divisor
from .ranked import rank_tables

# Weight of a vote against +, so that + wins where the votes cancel up to rounding. Float64 sums of fewer than 8192
# votes err by less than 2^-39 of their magnitudes. The kernels use the same number.
AGAINST = 1 - 2.0**-39


def run(
    base: Tensor,
    tuned: Sequence[Tensor],
    weights: Sequence[float],
    sparsifiers: Sequence[Sparsifier],
    elect: str,
    normalize: bool,
    alpha: float,
    out_dtype: torch.dtype,
) -> Tensor:
    """See `elect_and_sum`; without an election, the weights are already normalized."""
    dtype = accumulation_dtype(base, *tuned)
    start = base.to(dtype)
    # A generator, so that without an election only one task vector at a time is in memory.
    pairs = (
        _sparsified(tensor.to(dtype) - start, weight, rule)
        for tensor, weight, rule in zip(tuned, weights, sparsifiers, strict=True)
    )
    combined = torch.zeros_like(start)
    if elect == "none":
        for survivors, factor in pairs:
            combined += _rounded(factor, dtype) * survivors
    else:
        # The values that decide the side, and those that are summed.
        voters: list[tuple[Tensor, Tensor]] = []
        votes = torch.zeros_like(start, dtype=torch.float64)
        for survivors, factor in pairs:
            vector = _rounded(factor, dtype) * survivors
            voter = survivors if elect == "unweighted" else vector
            voters.append((voter, vector))
            if elect == "count":
                vote = (voter > 0).double() - (voter < 0).double()
            else:
                vote = survivors.double() * (1.0 if elect == "unweighted" else factor)
            votes += torch.where(vote < 0, AGAINST * vote, vote)
        positive = votes >= 0
        divisor = torch.zeros_like(start)
        for (voter, vector), weight in zip(voters, weights, strict=True):
            # Not "has the elected sign": NaN has none and must not disappear.
            against = torch.where(positive, voter < 0, voter > 0)
            combined += torch.where(against, 0, vector)
            divisor += torch.where(against | (voter == 0), 0, divisor.new_tensor(weight))
        if normalize:
            combined /= torch.where(divisor.abs() <= least_divisor(weights, dtype), 1, divisor)
    step = alpha * combined
    return torch.where(step == 0, start, start + step).to(out_dtype)  # -0.0 + 0.0 would be +0.0


def _sparsified(difference: Tensor, weight: float, rule: Sparsifier) -> tuple[Tensor, float | Tensor]:
    """Return the surviving differences, 0 elsewhere, and their factors, in float64."""
    survives = torch.ones_like(difference, dtype=torch.bool)
    if rule.largest is not None:
        survives &= rule.largest.mask(difference)
    if rule.outliers is not None:
        survives &= ~rule.outliers.mask(difference)
    if rule.mask is not None:
        survives &= rule.mask
    if rule.keep_probability < 1:
        survives &= _words(difference, rule) < mask_threshold(rule.keep_probability)
    factor: float | Tensor = weight * rule.rescale
    if rule.ranked is not None:
        tables = rank_tables(rule.ranked, weight * rule.rescale)
        ranks = rule.ranked.ranks.long()
        survives &= _words(difference, rule) < tables.thresholds.to(difference.device)[ranks]
        factor = tables.factors.to(difference.device)[ranks]
    return torch.where(survives, difference, 0), factor


def _words(difference: Tensor, rule: Sparsifier) -> Tensor:
    """Return the random word of each element, int64."""
    count = difference.numel()
    return random_words(count, rule.seed, rule.substream, difference.device, rule.first).view(difference.shape)


def _rounded(factor: float | Tensor, dtype: torch.dtype) -> float | Tensor:
    return factor.to(dtype) if isinstance(factor, Tensor) else factor
