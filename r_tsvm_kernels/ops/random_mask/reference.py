"""Random masks in torch: the definition of correct."""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10


def run(mask: Tensor, threshold: int, seed: int, substream: int) -> None:
    """See `random_mask`; fills `mask`, a contiguous tensor."""
    mask.copy_((random_words(mask.numel(), seed, substream, mask.device) < threshold).view(mask.shape))


def random_words(numel: int, seed: int, substream: int, device: torch.device, first: int = 0) -> Tensor:
    """Return the 32-bit words of so many elements from `first` on, a multiple of 4, as int64."""
    group = torch.arange(first // 4, (first + numel + 3) // 4, device=device)
    counter = (group & WORD, group >> 32, torch.full_like(group, substream), torch.zeros_like(group))
    return torch.stack(philox(counter, (seed & WORD, seed >> 32)), dim=1).flatten()[:numel]


def philox(counter: tuple[Tensor, ...], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox4x32-10: map counters, four int64 tensors of 32-bit words, to as many random words."""
    x0, x1, x2, x3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        high0, low0 = _multiply(MULTIPLIERS[0], x0)
        high2, low2 = _multiply(MULTIPLIERS[1], x2)
        x0, x1, x2, x3 = high2 ^ x1 ^ k0, low2, high0 ^ x3 ^ k1, low0
        k0, k1 = (k0 + KEY_INCREMENTS[0]) & WORD, (k1 + KEY_INCREMENTS[1]) & WORD
    return x0, x1, x2, x3


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the high and the low word of the product of two 32-bit words, in 16-bit steps: int64 is signed."""
    low = a * (b & 0xFFFF)
    high = a * (b >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)
