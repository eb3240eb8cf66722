"""The mask of a selection by spread by the native CPU module (csrc/cpu/spread_mask.cpp)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import backends
from .._native import matrix, with_rows
from ..magnitude_select import MagnitudeSelection


def run(base: Tensor, tuned: Sequence[Tensor], selection: MagnitudeSelection) -> Tensor:
    """See `spread_mask`; exact, for all strides and numbers of threads."""
    tensors = [with_rows(tensor) for tensor in (base, *tuned)]
    views = [matrix(tensor) for tensor in tensors]
    mask = torch.empty(base.shape, dtype=torch.bool, device="cpu")
    rule = (float(selection.threshold), int(selection.ties))
    backends.native("cpu").spread_mask(views[0], views[1:], rule, mask.data_ptr(), torch.get_num_threads())
    return mask
