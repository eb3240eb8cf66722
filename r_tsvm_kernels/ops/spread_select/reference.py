"""Selection by spread in torch: the definition of correct."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from .._checks import check_finite
from ..magnitude_select import MagnitudeSelection, nothing_of
from ..magnitude_select.reference import run as select
from ..task_spread.reference import run as task_spread


def run(base: Tensor, tuned: Sequence[Tensor], keep: Callable[[int], int]) -> MagnitudeSelection:
    """See `spread_select`."""
    return select_from(task_spread(base, tuned), keep, select)


def select_from(spread: Tensor, keep: Callable[[int], int], select: Callable[..., Any]) -> MagnitudeSelection:
    """Return the selection by this spread that an implementation of `magnitude_select` makes."""
    check_finite(spread, "spread_select")
    count = keep(int(spread.count_nonzero()))
    selection: MagnitudeSelection = select(spread, [count])[0] if count else nothing_of(spread)
    return selection
