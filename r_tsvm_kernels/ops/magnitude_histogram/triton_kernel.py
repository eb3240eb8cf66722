"""Counting digits of magnitudes in Triton, by the kernel of magnitude selection."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import accumulation_dtype
from .._triton import REAL, device_of, flat
from ..magnitude_select.triton_kernel import count_digits


def run(x: Tensor, bits: int, prefix: int, shift: int, base: Tensor | None) -> Tensor:
    """See `magnitude_histogram`; `shift` is the number of bits below the digit."""
    real = REAL[accumulation_dtype(*([x] if base is None else [x, base]))]
    with device_of(x):
        prefixes = torch.full((1,), prefix, dtype=torch.int64, device=x.device)
        return count_digits(flat(x), prefixes, real, shift, bits, None if base is None else flat(base))[0]
