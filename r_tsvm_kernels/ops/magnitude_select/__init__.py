"""Exact selection of the largest magnitudes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from ... import dispatch
from ...errors import ConfigError, DTypeError
from .._checks import FLOAT_DTYPES, check_finite


@dataclass(frozen=True)
class MagnitudeSelection:
    """Which elements survive: all above `threshold`, and the first `ties` (by flat index) of those equal to it.

    Attributes:
        threshold: 0-D tensor in the dtype of the input; infinity when nothing is kept.
        ties: 0-D int64 tensor, the number of elements with exactly this magnitude that are kept.
    """

    threshold: Tensor
    ties: Tensor

    def mask(self, x: Tensor) -> Tensor:
        """Return the boolean mask (shape of `x`) of the elements of `x` that survive."""
        magnitude = x.abs()
        tied = magnitude == self.threshold
        first = tied.flatten().cumsum(0).view(x.shape) <= self.ties
        return (magnitude > self.threshold) | (tied & first)


def kept_count(density: float, numel: int) -> int:
    """Return ``ceil(density * numel)``, exact for the decimal number that was written (0.07 of 100 is 7, not 8).

    Raises:
        ConfigError: `density` is not in [0, 1].
    """
    if not 0.0 <= density <= 1.0:
        raise ConfigError(f"density is the fraction that is kept: expected 0 <= density <= 1, got {density}")
    return math.ceil(Fraction(repr(float(density))) * numel)


def magnitude_select(x: Tensor, keep: int, *, backend: str | None = None) -> MagnitudeSelection:
    """Find the `keep` largest magnitudes of `x`; among equal ones the lowest flat index goes first.

    Exact: a mask made from the result has exactly `keep` elements set. -0.0 counts as 0.

    Args:
        x: any shape, float64, float32, float16 or bfloat16.
        keep: how many elements survive, 0 <= keep <= x.numel().
        backend: run this implementation or raise; None takes the fastest one that is available.

    Raises:
        ConfigError: `keep` is out of range.
        DTypeError: `x` is not floating point.
        NonFiniteError: `x` holds NaN or infinity: there is no order to select by.
        BackendUnavailable: `backend` cannot run here.
    """
    if x.dtype not in FLOAT_DTYPES:
        raise DTypeError(f"magnitude_select: expected a floating-point tensor, got {x.dtype}")
    if not 0 <= keep <= x.numel():
        raise ConfigError(f"magnitude_select: keep must lie in [0, {x.numel()}], got {keep}")
    check_finite(x, "magnitude_select")
    if keep == 0:
        return MagnitudeSelection(x.new_tensor(math.inf), torch.zeros((), dtype=torch.int64, device=x.device))
    run = dispatch.select("magnitude_select", x, backend=backend)
    result: MagnitudeSelection = run(x, keep)
    return result
