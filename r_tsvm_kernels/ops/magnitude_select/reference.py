"""Magnitude selection in torch: the definition of correct."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .._checks import accumulation_dtype, check_finite
from . import MagnitudeSelection


def run(x: Tensor, keep: Sequence[int], base: Tensor | None = None) -> list[MagnitudeSelection]:
    """See `magnitude_select`; one or more numbers, each from 1 to x.numel(). Without a base, `x` is finite."""
    if base is not None:
        dtype = accumulation_dtype(x, base)
        x = x.to(dtype) - base.to(dtype)
        check_finite(x, "magnitude_select")
    magnitude = x.abs().flatten().to(accumulation_dtype(x))  # exact: every 16-bit float is a float32
    selections = []
    for count in keep:
        threshold = magnitude.kthvalue(magnitude.numel() - count + 1).values
        selections.append(MagnitudeSelection(threshold.to(x.dtype), count - (magnitude > threshold).sum()))
    return selections
