"""Random masks by the native CUDA module (csrc/cuda/random_mask.cu)."""

from __future__ import annotations

from torch import Tensor

from ... import backends
from .._cuda import queue


def run(mask: Tensor, threshold: int, seed: int, stream: int) -> None:
    """See `random_mask`; fills `mask`, a contiguous tensor."""
    backends.native("cuda").random_mask(mask.data_ptr(), mask.numel(), (threshold, seed, stream), *queue(mask))
