"""Selection by spread in torch: the definition of correct."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from .._checks import check_finite
from ..magnitude_select import MagnitudeSelection, nothing_of
from ..magnitude_select.reference import run as select
from ..task_spread.reference import run as task_spread


def run(base: Tensor, tuned: Sequence[Tensor], keep: Callable[[int], int]) -> MagnitudeSelection:
    """See `spread_select`."""
    spread = task_spread(base, tuned)
    check_finite(spread, "spread_select")
    count = keep(int(spread.count_nonzero()))
    return select(spread, [count])[0] if count else nothing_of(spread)
