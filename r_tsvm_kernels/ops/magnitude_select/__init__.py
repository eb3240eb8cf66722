"""Exact selection of the largest magnitudes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from ... import dispatch
from ...errors import ConfigError, DTypeError
from .._checks import FLOAT_DTYPES, accumulation_dtype, check_finite, check_group


@dataclass(frozen=True)
class MagnitudeSelection:
    """Which elements survive: all above `threshold`, and the first `ties` (by flat index) of those equal to it.

    Attributes:
        threshold: 0-D tensor in the dtype of the magnitudes; infinity when nothing is kept.
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


def magnitude_select(
    x: Tensor, keep: int, *, base: Tensor | None = None, backend: str | None = None
) -> MagnitudeSelection:
    """Find the `keep` largest magnitudes of `x`, or of ``x - base``; of equal ones the lowest flat index goes first.

    Exact: a mask made from the result has exactly `keep` elements set. -0.0 counts as 0.

    Args:
        x: any shape, float64, float32, float16 or bfloat16.
        keep: how many elements survive, 0 <= keep <= x.numel().
        base: of the shape and device of `x`; the dtype may differ. The differences are formed in float32 (float64 if
            either input is float64), in which the threshold comes back too; the mask is then that of the differences.
            The native kernel never stores them.
        backend: run this implementation or raise; None takes the fastest one that is available.

    Raises:
        ConfigError: `keep` is out of range.
        DTypeError: `x` or `base` is not floating point.
        ShapeError, DeviceError: `x` and `base` do not match.
        NonFiniteError: a value is NaN or infinite: there is no order to select by.
        BackendUnavailable: `backend` cannot run here.
    """
    if x.dtype not in FLOAT_DTYPES:
        raise DTypeError(f"magnitude_select: expected a floating-point tensor, got {x.dtype}")
    if not 0 <= keep <= x.numel():
        raise ConfigError(f"magnitude_select: keep must lie in [0, {x.numel()}], got {keep}")
    if base is None:
        check_finite(x, "magnitude_select")
    else:
        check_group(base, [x], op="magnitude_select")
    tensors = [x] if base is None else [x, base]
    run = dispatch.select("magnitude_select", *tensors, backend=backend)
    if keep == 0:
        dtype = x.dtype if base is None else accumulation_dtype(*tensors)
        if base is not None:
            check_finite(x.to(dtype) - base.to(dtype), "magnitude_select")
        none = torch.zeros((), dtype=torch.int64, device=x.device)
        return MagnitudeSelection(torch.tensor(math.inf, dtype=dtype, device=x.device), none)
    result: MagnitudeSelection = run(x, keep) if base is None else run(x, keep, base)
    return result
