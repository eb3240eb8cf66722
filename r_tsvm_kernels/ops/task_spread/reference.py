"""The spread of task vectors in torch: the definition of correct."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._checks import accumulation_dtype, tile_elements


def run(base: Tensor, tuned: Sequence[Tensor]) -> Tensor:
    """See `task_spread`. Piece by piece, so that no task vector is stored whole."""
    dtype = accumulation_dtype(base, *tuned)
    spread = torch.zeros(base.shape, dtype=torch.float64, device=base.device)
    out, origin, *flat = (tensor.reshape(-1) for tensor in (spread, base, *tuned))
    size = tile_elements(base.device.type)
    for first in range(0, len(origin), size):
        part = slice(first, first + size)
        deltas = [(tensor[part].to(dtype) - origin[part].to(dtype)).double() for tensor in flat]
        mean = sum(deltas[1:], deltas[0]) / len(deltas)
        for delta in deltas:
            distance = delta - mean
            out[part] += distance * distance
    return spread
