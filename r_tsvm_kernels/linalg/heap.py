"""Memory that the C library keeps for the next matrices."""

from __future__ import annotations

from functools import cache

import torch

# Whatever glibc has learned, it takes larger blocks from the system, and returns them.
LARGEST_LEARNED = 32 << 20


@cache
def keep_freed_memory() -> None:
    """Let glibc keep up to 64 MiB of freed memory for matrices of up to 32 MiB; once per process.

    At first it returns blocks from 128 KiB on to the system at once, which then clears the pages of the next ones. It
    learns larger limits from the blocks that are freed (`mallopt(3)`, ``M_MMAP_THRESHOLD``). One is freed here, and no
    page of it is ever touched. Other C libraries do not learn from it.
    """
    torch.empty(LARGEST_LEARNED - (64 << 10), dtype=torch.uint8, device="cpu")
