"""Random masks in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import LAUNCH, block_offsets, device_of, random_words

BLOCK = 2048


@triton.jit
def random_mask_kernel(draw_ptr, out_ptr, numel, BLOCK: tl.constexpr):
    """``out_i = 1`` where the random word of element i is below the threshold, 0 elsewhere."""
    block = tl.program_id(0)
    offsets, inside = block_offsets(block, numel, BLOCK)
    words = random_words(block, tl.load(draw_ptr + 1), tl.load(draw_ptr + 2), 0, BLOCK)
    tl.store(out_ptr + offsets, (words.to(tl.int64) < tl.load(draw_ptr)).to(tl.uint8), mask=inside)


def run(mask: Tensor, threshold: int, seed: int, substream: int) -> None:
    """See `random_mask`; fills `mask`, a contiguous tensor."""
    if mask.numel() == 0:
        return
    # In memory: Triton would compile a kernel for each kind of integer.
    draw = draws([(threshold, seed, substream)], mask.device)
    with device_of(mask):
        random_mask_kernel[(triton.cdiv(mask.numel(), BLOCK),)](
            draw, mask.view(torch.uint8), mask.numel(), BLOCK, **LAUNCH
        )  # fmt: skip


def draws(rows: list[tuple[int, ...]], device: torch.device) -> Tensor:
    """Return threshold, seed, substream and what follows for each mask, int64 (masks, ...); the seed keeps 64 bits."""
    signed = [(threshold, seed - 2**64 if seed >= 2**63 else seed, *rest) for threshold, seed, *rest in rows]
    return torch.tensor(signed, dtype=torch.int64, device=device)
