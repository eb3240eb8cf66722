"""Random masks by rank in torch: the definition of correct."""

from __future__ import annotations

from torch import Tensor

from ..magnitude_ranks import magnitude_ranks
from ..random_mask.reference import random_words


def run(x: Tensor, base: Tensor | None, thresholds: Tensor, seed: int, substream: int) -> Tensor:
    """See `ranked_mask`; `x` has elements."""
    ranks = magnitude_ranks(x, base=base, backend="torch").long()
    words = random_words(x.numel(), seed, substream, x.device).view(x.shape)
    return words < thresholds.to(x.device)[ranks]
