"""Counting digits of magnitudes by the native CUDA module (csrc/cuda/magnitude_select.cu)."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import backends
from .._cuda import flat, queue
from .._native import matrix


def run(x: Tensor, bits: int, prefix: int, shift: int, base: Tensor | None) -> Tensor:
    """See `magnitude_histogram`; `shift` is the number of bits below the digit."""
    tensors = [flat(tensor) for tensor in ([x] if base is None else [x, base])]
    views = [matrix(tensor) for tensor in tensors]
    counts = torch.empty(1 << bits, dtype=torch.int64, device=x.device)
    native = backends.native("cuda")
    native.magnitude_histogram(
        views[0], None if base is None else views[1], bits, prefix, shift, counts.data_ptr(), *queue(x)
    )  # fmt: skip
    return counts
