"""Selection by spread by the native CPU module (csrc/cpu/spread_select.cpp)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ... import backends
from .._checks import raise_not_finite
from .._native import matrix, with_rows
from ..magnitude_select import MagnitudeSelection


def run(base: Tensor, tuned: Sequence[Tensor], keep: Callable[[int], int]) -> MagnitudeSelection:
    """See `spread_select`; exact, for all strides and numbers of threads."""
    tensors = [with_rows(tensor) for tensor in (base, *tuned)]
    views = [matrix(tensor) for tensor in tensors]
    threshold = torch.empty((), dtype=torch.float64, device="cpu")
    ties = torch.empty((), dtype=torch.int64, device="cpu")
    nonfinite = torch.empty((), dtype=torch.int64, device="cpu")
    output = (threshold.data_ptr(), ties.data_ptr(), nonfinite.data_ptr())
    backends.native("cpu").spread_select(views[0], views[1:], keep, output, torch.get_num_threads())
    if nonfinite:
        raise_not_finite("spread_select", int(nonfinite), base.numel())
    return MagnitudeSelection(threshold, ties)
