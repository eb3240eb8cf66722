"""Selection by spread by the Triton kernels of `task_spread` and `magnitude_select`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from .._checks import check_finite
from ..magnitude_select import MagnitudeSelection, nothing_of
from ..magnitude_select.triton_kernel import run as select
from ..task_spread.triton_kernel import run as task_spread


def run(base: Tensor, tuned: Sequence[Tensor], keep: Callable[[int], int]) -> MagnitudeSelection:
    """See `spread_select`; exact. Waits for the device, to count the elements in which the tasks differ."""
    spread = task_spread(base, tuned)
    check_finite(spread, "spread_select")
    count = keep(int(spread.count_nonzero()))
    return select(spread, [count])[0] if count else nothing_of(spread)
