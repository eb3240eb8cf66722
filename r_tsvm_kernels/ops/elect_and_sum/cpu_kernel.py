"""Sparsifying, electing and summing by the native CPU module (csrc/cpu/elect_and_sum.cpp)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import backends
from .._checks import accumulation_dtype
from .._native import ELEMENT_TYPES, aligned, matrix, with_rows
from ..magnitude_select import MagnitudeSelection
from ..random_mask import mask_threshold
from . import Sparsifier, least_divisor
from .ranked import rank_tables

# Codes of r_tsvm::Election (csrc/include/r_tsvm/elect_and_sum.h).
ELECTIONS = {"none": 0, "sum": 1, "count": 2, "unweighted": 3}


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
    """See `elect_and_sum`; the same bits as the reference, for all strides and numbers of threads."""
    tensors = [with_rows(tensor) for tensor in (base, *tuned)]
    views = [matrix(tensor) for tensor in tensors]
    dtype = accumulation_dtype(base, *tuned)
    ranked = [_ranked(rule, weight) for weight, rule in zip(weights, sparsifiers, strict=True)]
    masks = [None if rule.mask is None else rule.mask.contiguous() for rule in sparsifiers]
    tasks = [
        (
            weight,
            weight * rule.rescale,
            _selection(rule.largest, dtype),
            _selection(rule.outliers, dtype),
            (mask_threshold(rule.keep_probability), rule.seed, rule.substream, rule.first),
            tuple(tensor.data_ptr() for tensor in tables) or (0, 0, 0),
            0 if mask is None else mask.data_ptr(),
        )
        for weight, rule, tables, mask in zip(weights, sparsifiers, ranked, masks, strict=True)
    ]
    output = torch.empty(base.shape, dtype=out_dtype, device=base.device)
    threads = torch.get_num_threads()
    native = backends.native("cpu")
    native.elect_and_sum(
        views[0], views[1:], tasks, ELECTIONS[elect], normalize, least_divisor(weights, dtype), alpha,
        output.data_ptr(), ELEMENT_TYPES[out_dtype], threads,
    )  # fmt: skip
    return output


def _selection(selection: MagnitudeSelection | None, dtype: torch.dtype) -> tuple[float, int]:
    """Return threshold and ties; a negative number of ties if there is no selection."""
    if selection is None:
        return 0.0, -1
    selection = selection.rounded(dtype)
    return float(selection.threshold), int(selection.ties)


def _ranked(rule: Sparsifier, weight: float) -> tuple[Tensor, ...]:
    """Return ranks, thresholds and factors; nothing if there are no ranks."""
    if rule.ranked is None:
        return ()
    return (aligned(rule.ranked.ranks.contiguous()), *rank_tables(rule.ranked, weight * rule.rescale))
