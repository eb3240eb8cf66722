"""Random masks by rank in Triton: the ranks of `magnitude_ranks`, then a draw for each element."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import LAUNCH, block_offsets, device_of, flat, random_words
from ..magnitude_ranks.triton_kernel import run as magnitude_ranks
from ..random_mask.triton_kernel import draws

BLOCK = 1024


@triton.jit
def ranked_mask_kernel(ranks_ptr, thresholds_ptr, draw_ptr, out_ptr, numel, BLOCK: tl.constexpr):
    """``out_i = 1`` where the random word of element i is below the threshold of its rank, 0 elsewhere.

    `draw_ptr` points to a number that is not used, seed and substream.
    """
    block = tl.program_id(0)
    offsets, inside = block_offsets(block, numel, BLOCK)
    words = random_words(block, tl.load(draw_ptr + 1), tl.load(draw_ptr + 2), 0, BLOCK)
    rank = tl.load(ranks_ptr + offsets, mask=inside, other=0)  # (BLOCK,)
    survives = words.to(tl.int64) < tl.load(thresholds_ptr + rank)
    tl.store(out_ptr + offsets, survives.to(tl.uint8), mask=inside)


def run(x: Tensor, base: Tensor | None, thresholds: Tensor, seed: int, substream: int) -> Tensor:
    """See `ranked_mask`; `x` has elements. Waits for the device once, to refuse NaN and infinity."""
    ranks = magnitude_ranks(x, base)
    mask = torch.empty(x.shape, dtype=torch.bool, device=x.device)
    numel, draw = x.numel(), draws([(0, seed, substream)], x.device)
    table = flat(thresholds.to(x.device))
    with device_of(x):
        ranked_mask_kernel[(triton.cdiv(numel, BLOCK),)](
            ranks, table, draw, mask.view(torch.uint8), numel, BLOCK, **LAUNCH
        )  # fmt: skip
    return mask
