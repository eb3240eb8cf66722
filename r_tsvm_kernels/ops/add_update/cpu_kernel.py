"""Base plus update by the native CPU module (csrc/cpu/add_update.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import backends
from .._native import ELEMENT_TYPES, matrix, with_rows


def run(base: Tensor, update: Tensor, alpha: float, out_dtype: torch.dtype) -> Tensor:
    """See `add_update`; the same bits as the reference, for all strides and numbers of threads."""
    start, step = with_rows(base), with_rows(update)
    output = torch.empty(base.shape, dtype=out_dtype, device=base.device)
    backends.native("cpu").add_update(
        matrix(start), matrix(step), alpha, output.data_ptr(), ELEMENT_TYPES[out_dtype], torch.get_num_threads()
    )
    return output
