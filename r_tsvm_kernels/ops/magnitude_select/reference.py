"""Magnitude selection in torch: the definition of correct."""

from __future__ import annotations

from torch import Tensor

from .._checks import accumulation_dtype
from . import MagnitudeSelection


def run(x: Tensor, keep: int) -> MagnitudeSelection:
    """See `magnitude_select`; 1 <= keep <= x.numel()."""
    magnitude = x.abs().flatten().to(accumulation_dtype(x))  # exact: every 16-bit float is a float32
    threshold = magnitude.kthvalue(magnitude.numel() - keep + 1).values
    return MagnitudeSelection(threshold.to(x.dtype), keep - (magnitude > threshold).sum())
