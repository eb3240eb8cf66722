"""The mask of a selection by spread, by the Triton kernel of `task_spread`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..magnitude_select import MagnitudeSelection
from ..task_spread.triton_kernel import run as task_spread


def run(base: Tensor, tuned: Sequence[Tensor], selection: MagnitudeSelection) -> Tensor:
    """See `spread_mask`. Never waits for the device."""
    return selection.mask(task_spread(base, tuned))
