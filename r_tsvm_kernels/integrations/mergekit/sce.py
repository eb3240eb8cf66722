"""mergekit's SCE with our kernels: exact counts, variances and weights in float64, without storing task vectors."""

from __future__ import annotations

import torch
from mergekit.merge_methods import TensorGroup
from torch import Tensor

from ...methods.sce import add_erased_mean, squared_norms
from ...ops import spread_mask, spread_select
from . import INSTALLATION
from .kernels import accepted

SMALLEST_SQUARES = 1e-6  # of all task vectors; mergekit gives them equal weights below it
SMALLEST_DIVISOR = 1e-6


def sce(group: TensorGroup, int8_mask: bool = False, select_topk: float = 1.0) -> Tensor | None:
    """Select by variance, weight by squares, erase minority signs. None for inputs that mergekit should handle."""
    tuned = [entry.tensor for entry in group.non_base]
    base: Tensor = group.base.tensor
    if not tuned or not accepted(base, *tuned):
        return None
    selected = None
    if select_topk < 1:
        selection = spread_select(base, tuned, lambda differing: max(0, int(differing * select_topk)))
        if selection.threshold.isinf():
            return None  # nothing is selected: mergekit returns the base
        INSTALLATION.count("spread_select")
        selected = spread_mask(base, tuned, selection)
    squares = torch.tensor(squared_norms(base, tuned, selected), dtype=torch.float64, device="cpu") / base.numel()
    total = float(squares.sum())
    if not squares.isfinite().all():
        return None
    shares = squares / total if total >= SMALLEST_SQUARES else torch.full_like(squares, 1 / len(tuned))
    if bool(((shares > 0) & (shares < SMALLEST_DIVISOR)).any()):
        return None  # mergekit raises such divisors
    INSTALLATION.count("sce")
    return add_erased_mean(base, tuned, selected, shares.tolist()).to(base.dtype)
