"""Magnitude selection in torch: the definition of correct."""

from __future__ import annotations

from torch import Tensor

from .._checks import accumulation_dtype, check_finite
from . import MagnitudeSelection


def run(x: Tensor, keep: int, base: Tensor | None = None) -> MagnitudeSelection:
    """See `magnitude_select`; 1 <= keep <= x.numel(). Without a base, `x` is finite."""
    if base is not None:
        dtype = accumulation_dtype(x, base)
        x = x.to(dtype) - base.to(dtype)
        check_finite(x, "magnitude_select")
    magnitude = x.abs().flatten().to(accumulation_dtype(x))  # exact: every 16-bit float is a float32
    threshold = magnitude.kthvalue(magnitude.numel() - keep + 1).values
    return MagnitudeSelection(threshold.to(x.dtype), keep - (magnitude > threshold).sum())
