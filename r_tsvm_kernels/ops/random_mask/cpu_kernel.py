"""Random masks by the native CPU module (csrc/cpu/random_mask.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import backends


def run(mask: Tensor, threshold: int, seed: int, substream: int) -> None:
    """See `random_mask`; fills `mask`, a contiguous tensor."""
    argument = (threshold, seed, substream, 0)
    backends.native("cpu").random_mask(mask.data_ptr(), mask.numel(), argument, torch.get_num_threads())
