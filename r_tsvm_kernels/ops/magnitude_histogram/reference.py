"""Counting digits of magnitudes in torch: the definition of correct."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import accumulation_dtype


def run(x: Tensor, bits: int, prefix: int, shift: int, base: Tensor | None) -> Tensor:
    """See `magnitude_histogram`; `shift` is the number of bits below the digit."""
    tensors = [x] if base is None else [x, base]
    dtype = accumulation_dtype(*tensors)
    values = x.to(dtype) if base is None else x.to(dtype) - base.to(dtype)
    integer = torch.int64 if dtype == torch.float64 else torch.int32
    patterns = values.flatten().view(integer) & torch.iinfo(integer).max
    begins = patterns >> shift
    # Those with another prefix are counted in one entry more. Neither masked_select nor bincount: they wait for a GPU.
    digits = torch.where(begins >> bits == prefix, begins & ((1 << bits) - 1), 1 << bits).long()
    counts = torch.zeros((1 << bits) + 1, dtype=torch.int64, device=x.device)
    counts.scatter_add_(0, digits, torch.ones((), dtype=torch.int64, device=x.device).expand_as(digits))
    return counts[:-1].clone()
