"""Magnitude selection by the native CUDA module (csrc/cuda/magnitude_select.cu)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import backends
from .._checks import accumulation_dtype, raise_not_finite
from .._cuda import flat, queue, workspace
from .._native import matrix
from . import MagnitudeSelection


def run(x: Tensor, keep: Sequence[int], base: Tensor | None = None) -> list[MagnitudeSelection]:
    """See `magnitude_select`; one or more numbers, each from 1 to x.numel(). Waits for the device only with a base."""
    native = backends.native("cuda")
    tensors = [flat(tensor) for tensor in ([x] if base is None else [x, base])]
    views = [matrix(tensor) for tensor in tensors]
    thresholds = torch.empty(len(keep), dtype=torch.float64, device=x.device)
    ties = torch.empty(len(keep), dtype=torch.int64, device=x.device)
    nonfinite = torch.empty((), dtype=torch.int64, device=x.device)
    output = (thresholds.data_ptr(), ties.data_ptr(), nonfinite.data_ptr())
    memory = workspace(native.magnitude_select_workspace(), x)
    native.magnitude_select(
        views[0], None if base is None else views[1], keep, output, memory.data_ptr(), *queue(x)
    )  # fmt: skip
    if base is not None and nonfinite:  # without a base `x` has been checked
        raise_not_finite("magnitude_select", int(nonfinite), x.numel())
    thresholds = thresholds.to(x.dtype if base is None else accumulation_dtype(x, base))
    return [MagnitudeSelection(*pair) for pair in zip(thresholds, ties, strict=True)]
