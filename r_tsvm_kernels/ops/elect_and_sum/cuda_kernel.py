"""Sparsifying, electing and summing by the native CUDA module (csrc/cuda/elect_and_sum.cu)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import backends
from .._checks import accumulation_dtype
from .._cuda import flat, queue, workspace
from .._native import ELEMENT_TYPES, matrix
from ..magnitude_select import MagnitudeSelection
from ..random_mask import mask_threshold
from . import Sparsifier, least_divisor
from .cpu_kernel import ELECTIONS
from .ranked import rank_tables


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
    """See `elect_and_sum`. Selections stay on the device, so nothing waits for them."""
    native = backends.native("cuda")
    dtype = accumulation_dtype(base, *tuned)
    tensors = [flat(tensor) for tensor in (base, *tuned)]
    views = [matrix(tensor) for tensor in tensors]
    selections: list[MagnitudeSelection] = []
    alive: list[Tensor] = []  # until the work is queued

    def index(selection: MagnitudeSelection | None) -> int:
        if selection is None:
            return -1
        selections.append(selection.rounded(dtype))
        return len(selections) - 1

    def tables(rule: Sparsifier, weight: float) -> tuple[int, int, int]:
        if rule.ranked is None:
            return 0, 0, 0
        by_rank = [table.to(base.device) for table in rank_tables(rule.ranked, weight * rule.rescale)]
        alive.extend([rule.ranked.ranks.contiguous(), *by_rank])
        ranks, thresholds, factors = (tensor.data_ptr() for tensor in alive[-3:])
        return ranks, thresholds, factors

    def mask(rule: Sparsifier) -> int:
        if rule.mask is None:
            return 0
        alive.append(rule.mask.contiguous())
        return alive[-1].data_ptr()

    tasks = [
        (
            weight,
            weight * rule.rescale,
            index(rule.largest),
            index(rule.outliers),
            (mask_threshold(rule.keep_probability), rule.seed, rule.substream, rule.first),
            tables(rule, weight),
            mask(rule),
        )
        for weight, rule in zip(weights, sparsifiers, strict=True)
    ]
    thresholds = _stacked([selection.threshold for selection in selections], torch.float64, base)
    ties = _stacked([selection.ties for selection in selections], torch.int64, base)
    output = torch.empty(base.shape, dtype=out_dtype, device=base.device)
    memory = workspace(native.elect_and_sum_workspace(base.numel(), len(tuned), len(selections)), base)
    native.elect_and_sum(
        views[0], views[1:], tasks, ELECTIONS[elect], normalize, least_divisor(weights, dtype), alpha,
        (thresholds.data_ptr(), ties.data_ptr(), len(selections)), output.data_ptr(), ELEMENT_TYPES[out_dtype],
        memory.data_ptr(), *queue(base),
    )  # fmt: skip
    return output


def _stacked(numbers: list[Tensor], dtype: torch.dtype, base: Tensor) -> Tensor:
    if not numbers:
        return torch.empty(0, dtype=dtype, device=base.device)
    return torch.stack([number.to(base.device, dtype) for number in numbers])
