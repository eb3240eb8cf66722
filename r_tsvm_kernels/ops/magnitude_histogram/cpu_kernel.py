"""Counting digits of magnitudes by the native CPU module (csrc/cpu/magnitude_histogram.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import backends
from .._native import matrix, with_rows


def run(x: Tensor, bits: int, prefix: int, shift: int, base: Tensor | None) -> Tensor:
    """See `magnitude_histogram`; `shift` is the number of bits below the digit."""
    tensors = [with_rows(tensor) for tensor in ([x] if base is None else [x, base])]
    views = [matrix(tensor) for tensor in tensors]
    counts = torch.empty(1 << bits, dtype=torch.int64)
    origin = None if base is None else views[1]
    threads = torch.get_num_threads()
    backends.native("cpu").magnitude_histogram(views[0], origin, (bits, prefix, shift), counts.data_ptr(), threads)
    return counts
