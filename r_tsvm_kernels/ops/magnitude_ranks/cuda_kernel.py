"""Ranks of magnitudes by the native CUDA module (csrc/cuda/magnitude_ranks.cu)."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import backends
from .._checks import accumulation_dtype, raise_not_finite
from .._cuda import flat, queue, workspace
from .._native import matrix


def run(x: Tensor, base: Tensor | None) -> Tensor:
    """See `magnitude_ranks`; `x` has elements. Waits for the device once, to refuse NaN and infinity."""
    native = backends.native("cuda")
    tensors = [flat(tensor) for tensor in ([x] if base is None else [x, base])]
    views = [matrix(tensor) for tensor in tensors]
    cols = x.shape[-1]
    device, stream = queue(x)
    wide = accumulation_dtype(*tensors) == torch.float64
    memory = workspace(native.magnitude_ranks_workspace(x.numel() // cols, cols, wide, device), x)
    ranks = torch.empty(x.shape, dtype=torch.int32, device=x.device)
    nonfinite = torch.empty((), dtype=torch.int64, device=x.device)
    native.magnitude_ranks(
        views[0], None if base is None else views[1], cols, ranks.data_ptr(), nonfinite.data_ptr(), memory.data_ptr(),
        device, stream,
    )  # fmt: skip
    if nonfinite:
        raise_not_finite("magnitude_ranks", int(nonfinite), x.numel())
    return ranks
