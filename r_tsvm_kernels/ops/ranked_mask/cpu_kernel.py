"""Random masks by rank, by the native CPU module (csrc/cpu/ranked_mask.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import backends
from .._checks import raise_not_finite
from .._native import matrix, with_rows
from . import reference


def run(x: Tensor, base: Tensor | None, thresholds: Tensor, seed: int, substream: int) -> Tensor:
    """See `ranked_mask`; `x` has elements. The kernel takes probabilities that do not fall with the rank."""
    if bool((thresholds[1:] < thresholds[:-1]).any()):
        return reference.run(x, base, thresholds, seed, substream)
    tensors = [with_rows(tensor) for tensor in ([x] if base is None else [x, base])]
    views = [matrix(tensor) for tensor in tensors]
    mask = torch.empty(x.shape, dtype=torch.bool, device="cpu")
    nonfinite = torch.empty((), dtype=torch.int64, device="cpu")
    thresholds = thresholds.contiguous()
    backends.native("cpu").ranked_mask(
        views[0], None if base is None else views[1], (thresholds.data_ptr(), x.shape[-1]), (seed, substream),
        (mask.data_ptr(), nonfinite.data_ptr()), torch.get_num_threads(),
    )  # fmt: skip
    if nonfinite:
        raise_not_finite("ranked_mask", int(nonfinite), x.numel())
    return mask
