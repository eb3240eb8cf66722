"""Ranks of magnitudes by the native CPU module (csrc/cpu/magnitude_ranks.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import backends
from .._checks import raise_not_finite
from .._native import matrix, with_rows


def run(x: Tensor, base: Tensor | None) -> Tensor:
    """See `magnitude_ranks`; `x` has elements."""
    tensors = [with_rows(tensor) for tensor in ([x] if base is None else [x, base])]
    views = [matrix(tensor) for tensor in tensors]
    ranks = torch.empty(x.shape, dtype=torch.int32, device="cpu")
    nonfinite = torch.empty((), dtype=torch.int64, device="cpu")
    output = (ranks.data_ptr(), nonfinite.data_ptr())
    backends.native("cpu").magnitude_ranks(
        views[0], None if base is None else views[1], x.shape[-1], output, torch.get_num_threads()
    )
    if nonfinite:
        raise_not_finite("magnitude_ranks", int(nonfinite), x.numel())
    return ranks
