"""The mask of a selection by spread in torch: the definition of correct."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..magnitude_select import MagnitudeSelection
from ..task_spread.reference import run as task_spread


def run(base: Tensor, tuned: Sequence[Tensor], selection: MagnitudeSelection) -> Tensor:
    """See `spread_mask`."""
    return selection.mask(task_spread(base, tuned))
