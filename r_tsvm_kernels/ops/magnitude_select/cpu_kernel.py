"""Magnitude selection by the native CPU module (csrc/cpu/magnitude_select.cpp)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import backends
from .._checks import accumulation_dtype, raise_not_finite
from .._native import matrix, with_rows
from . import MagnitudeSelection


def run(x: Tensor, keep: Sequence[int], base: Tensor | None = None) -> list[MagnitudeSelection]:
    """See `magnitude_select`; one or more numbers, each from 1 to x.numel()."""
    return [_select(x, count, base) for count in keep]


def _select(x: Tensor, keep: int, base: Tensor | None) -> MagnitudeSelection:
    tensors = [with_rows(tensor) for tensor in ([x] if base is None else [x, base])]
    views = [matrix(tensor) for tensor in tensors]
    threshold = torch.empty((), dtype=torch.float64)
    ties, nonfinite = torch.empty(2, dtype=torch.int64).unbind()
    output = (threshold.data_ptr(), ties.data_ptr(), nonfinite.data_ptr())
    backends.native("cpu").magnitude_select(
        views[0], None if base is None else views[1], keep, output, torch.get_num_threads()
    )
    if nonfinite:
        raise_not_finite("magnitude_select", int(nonfinite), x.numel())
    return MagnitudeSelection(threshold.to(x.dtype if base is None else accumulation_dtype(x, base)), ties.clone())
