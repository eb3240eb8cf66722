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
    tensors = [with_rows(tensor) for tensor in ([x] if base is None else [x, base])]
    views = [matrix(tensor) for tensor in tensors]
    thresholds = torch.empty(len(keep), dtype=torch.float64, device="cpu")
    ties = torch.empty(len(keep), dtype=torch.int64, device="cpu")
    nonfinite = torch.empty((), dtype=torch.int64, device="cpu")
    output = (thresholds.data_ptr(), ties.data_ptr(), nonfinite.data_ptr())
    backends.native("cpu").magnitude_select(
        views[0], None if base is None else views[1], keep, output, torch.get_num_threads()
    )
    if nonfinite:
        raise_not_finite("magnitude_select", int(nonfinite), x.numel())
    thresholds = thresholds.to(x.dtype if base is None else accumulation_dtype(x, base))
    return [MagnitudeSelection(t.clone(), n.clone()) for t, n in zip(thresholds, ties, strict=True)]
