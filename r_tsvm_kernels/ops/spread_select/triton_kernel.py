"""Selection by spread by the Triton kernels of `task_spread` and `magnitude_select`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from ..magnitude_select import MagnitudeSelection
from ..magnitude_select.triton_kernel import run as select
from ..task_spread.triton_kernel import run as task_spread
from .reference import select_from


def run(base: Tensor, tuned: Sequence[Tensor], keep: Callable[[int], int]) -> MagnitudeSelection:
    """See `spread_select`; exact. Waits for the device, to count the elements in which the tasks differ."""
    return select_from(task_spread(base, tuned), keep, select)
