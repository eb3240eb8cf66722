"""Exact selection of the largest magnitudes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import overload

import torch
from torch import Tensor

from ... import dispatch
from ...errors import ConfigError
from .._checks import accumulation_dtype, check_finite, check_floating, check_group, plain_values, whole

# Elements of a mask made at one time on a CPU: few enough for a core's cache, and enough to outweigh the overhead.
MASK_TILE = 1 << 17


@dataclass(frozen=True)
class MagnitudeSelection:
    """Which elements survive: all above `threshold`, and the first `ties`, by flat index, of those equal to it.

    Attributes:
        threshold: 0-D tensor in the dtype of the magnitudes; infinity when nothing is kept.
        ties: 0-D int64 tensor, the number of elements with exactly this magnitude that are kept.
    """

    threshold: Tensor
    ties: Tensor

    def mask(self, x: Tensor) -> Tensor:
        """Return the boolean mask (shape of `x`) of the elements of `x` that survive; exact for any two dtypes."""
        # Explicitly: torch would round a 0-D tensor to the dtype of the other one.
        dtype = torch.promote_types(x.dtype, self.threshold.dtype)
        threshold = self.threshold.to(dtype)
        if x.device.type == "cpu":
            return self._mask_on_cpu(x, threshold)
        magnitude = x.abs().to(dtype)
        kept, tied = magnitude > threshold, magnitude == threshold
        first = tied.flatten().cumsum(0).view(x.shape) <= self.ties
        return kept | (tied & first)

    def _mask_on_cpu(self, x: Tensor, threshold: Tensor) -> Tensor:
        """Work piece by piece, within the cache. Ties are few. A GPU would have to be waited for to count them."""
        mask = torch.empty(x.shape, dtype=torch.bool, device="cpu")
        flat, kept, ties = x.reshape(-1), mask.view(-1), int(self.ties)
        for first in range(0, len(flat), MASK_TILE):
            magnitude, part = flat[first : first + MASK_TILE].abs().to(threshold.dtype), kept[first : first + MASK_TILE]
            torch.gt(magnitude, threshold, out=part)
            if ties > 0:
                tied = (magnitude == threshold).nonzero()[:ties, 0]
                part[tied] = True
                ties -= len(tied)
        return mask

    def rounded(self, dtype: torch.dtype) -> MagnitudeSelection:
        """Return the selection that makes the same masks of tensors of `dtype`, with its threshold in `dtype`.

        A threshold between two magnitudes of `dtype` becomes the lower one, with no ties.

        Args:
            dtype: float32 or float64.
        """
        threshold = self.threshold.to(dtype)
        if torch.promote_types(dtype, self.threshold.dtype) == dtype:
            return MagnitudeSelection(threshold, self.ties)
        below = torch.nextafter(threshold, torch.zeros_like(threshold))
        threshold = torch.where(threshold.to(self.threshold.dtype) > self.threshold, below, threshold)
        exact = threshold.to(self.threshold.dtype) == self.threshold
        return MagnitudeSelection(threshold, torch.where(exact, self.ties, 0))


def kept_count(density: float, numel: int) -> int:
    """Return ``ceil(density * numel)``, exact for the decimal number as written: 0.07 of 100 is 7, not 8.

    Args:
        density: fraction kept, in [0, 1].
        numel: number of elements, >= 0.

    Raises:
        ConfigError: `density` is not in [0, 1], or `numel` is negative.

    Examples:
        >>> kept_count(0.07, 100)
        7
    """
    if not 0.0 <= density <= 1.0:
        raise ConfigError(f"density is the fraction kept: expected 0 <= density <= 1, got {density}")
    if numel < 0:
        raise ConfigError(f"kept_count: numel must be >= 0, got {numel}")
    return math.ceil(Fraction(repr(float(density))) * numel)


@overload
def magnitude_select(
    x: Tensor, keep: int, *, base: Tensor | None = None, backend: str | None = None
) -> MagnitudeSelection: ...


@overload
def magnitude_select(
    x: Tensor, keep: Sequence[int], *, base: Tensor | None = None, backend: str | None = None
) -> tuple[MagnitudeSelection, ...]: ...


@dispatch.op(
    "Selection by magnitude",
    cpu=("cpu", "torch"),
    cuda=("cuda", "triton", "torch"),
    small={"BLOCK": 128, "PROGRAMS": 2},
)
def magnitude_select(
    x: Tensor, keep: int | Sequence[int], *, base: Tensor | None = None, backend: str | None = None
) -> MagnitudeSelection | tuple[MagnitudeSelection, ...]:
    """Find the `keep` largest magnitudes of `x`, or of ``x - base``; among equal ones those of lowest flat index.

    Exact: a mask made from the result has exactly `keep` elements set. -0.0 counts as 0. TIES (arXiv 2306.01708),
    Breadcrumbs and R-TSVM prune by it.

    Args:
        x: any shape, float64, float32, float16 or bfloat16.
        keep: how many elements survive, 0 <= keep <= x.numel(); `kept_count` gives it for a fraction. Several numbers
            give several selections, found in shared passes over the data.
        base: of the shape and device of `x`; the dtype may differ. The differences are formed in float32 (float64 if
            either input is float64), which is the dtype of the threshold, too; the mask applies to the differences.
            The kernels never store them.
        backend: run this implementation or raise; None takes the fastest one that is available.

    Returns:
        One selection, or a tuple with one for each number in `keep`.

    Raises:
        ConfigError: `keep` is not a whole number, or out of range.
        DTypeError: `x` or `base` is not floating point.
        ShapeError, DeviceError: `x` and `base` do not match.
        NonFiniteError: a value is NaN or infinite, so there is no order to select by.
        BackendUnavailableError: `backend` cannot run here.

    Examples:
        >>> import torch
        >>> x = torch.tensor([1.0, -3.0, 2.0, 3.0])
        >>> magnitude_select(x, kept_count(0.5, x.numel())).mask(x)
        tensor([False,  True, False,  True])
    """
    check_floating(x, "magnitude_select: x")
    given = plain_values(keep)
    several = isinstance(given, Sequence)
    counts = []
    for value in given if several else [given]:
        if isinstance(value, float):
            raise ConfigError(
                f"magnitude_select: keep is a count, got {value!r}; use kept_count(density, x.numel()) for a fraction"
            )
        counts.append(whole(value, "magnitude_select: keep"))
    for count in counts:
        if not 0 <= count <= x.numel():
            raise ConfigError(f"magnitude_select: keep must be in [0, {x.numel()}], got {count}")
    if base is not None:
        check_group(base, [x], op="magnitude_select")
    tensors = [x] if base is None else [x, base]
    run = dispatch.select("magnitude_select", *tensors, backend=backend)
    if base is None:
        check_finite(x, "magnitude_select")
    positive = [count for count in counts if count > 0]
    found: list[MagnitudeSelection] = []
    if positive:
        found = run(x, positive) if base is None else run(x, positive, base)
    elif base is not None:
        dtype = accumulation_dtype(*tensors)
        check_finite(x.to(dtype) - base.to(dtype), "magnitude_select")
    rest = iter(found)
    selections = tuple(next(rest) if count > 0 else nothing_of(*tensors) for count in counts)
    return selections if several else selections[0]


def nothing_of(x: Tensor, *base: Tensor) -> MagnitudeSelection:
    """Return the selection of no element of `x`, or of ``x - base``."""
    dtype = accumulation_dtype(x, *base) if base else x.dtype
    none = torch.zeros((), dtype=torch.int64, device=x.device)
    return MagnitudeSelection(torch.tensor(math.inf, dtype=dtype, device=x.device), none)
