"""Checksums of tensor values: XXH3 with 128 bits, faster than any disk. They do not protect against forgery."""

from __future__ import annotations

import torch
import xxhash
from torch import Tensor


class Checksum:
    """Checksum of bytes that arrive in pieces, e.g. the row tiles of one tensor from first to last."""

    def __init__(self) -> None:
        self._state = xxhash.xxh3_128()

    def update(self, piece: Tensor | bytes | memoryview) -> None:
        """Append a piece."""
        self._state.update(byte_view(piece) if isinstance(piece, Tensor) else piece)

    def hexdigest(self) -> str:
        """Return the checksum of everything so far, as 32 hexadecimal digits."""
        return self._state.hexdigest()


def checksum(data: Tensor | bytes | memoryview) -> str:
    """Return the checksum of the raw bytes; dtype and shape make no difference."""
    state = Checksum()
    state.update(data)
    return state.hexdigest()


def byte_view(tensor: Tensor) -> memoryview:
    """Return the values as bytes: the memory of a contiguous tensor on the CPU, otherwise a copy."""
    if not tensor.numel():
        return memoryview(b"")
    view: memoryview = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
    return view
