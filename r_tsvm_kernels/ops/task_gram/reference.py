"""Gram matrices of task vectors in torch: the definition of correct."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from .._checks import tile_elements

# Products are summed in blocks, because some BLAS libraries sum in sequence, and their rounding errors grow with the
# length.
BLOCK = 4096


def run(tuned: Sequence[Tensor], base: Tensor | None, mask: Tensor | None) -> Tensor:
    """See `task_gram`. Piece by piece, so that no task vector is stored whole."""
    flat = [tensor.reshape(-1) for tensor in tuned]
    origin, chosen = (None if tensor is None else tensor.reshape(-1) for tensor in (base, mask))
    gram = flat[0].new_zeros(len(flat), len(flat), dtype=torch.float64)
    size = tile_elements(gram.device.type)
    for first in range(0, len(flat[0]), size):
        part = slice(first, first + size)
        X = torch.stack([tensor[part].double() for tensor in flat])  # (T, size)
        if origin is not None:
            X -= origin[part].double()
        if chosen is not None:
            X.masked_fill_(~chosen[part], 0)
        blocks = pad(X, (0, -X.shape[1] % BLOCK)).view(len(flat), -1, BLOCK).transpose(0, 1)  # (pieces, T, BLOCK)
        gram += (blocks @ blocks.mT).sum(0)
    return gram
