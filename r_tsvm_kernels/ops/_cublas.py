"""Products of planes by cuBLAS, through PyTorch: fp16 factors, sums in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from ._planes import LOW, Planes

# Tensor cores cut their sums off, where float32 would round them. Sums of `hi hi` are therefore no longer than this,
# and are added to each other in float32. What comes from low planes is smaller by 2^11.
CHUNK = 512


def product(A: Planes, B: Planes) -> Tensor:
    """As `_planes.product`: ``A @ B`` without the scales, for planes with one leading dimension."""
    total = _empty(A, B)
    _add_high(total, A, B)
    if A.lo is not None and B.lo is not None:
        _add(total, A.hi, B.lo, alpha=1 / LOW)
        _add(total, A.lo, B.hi, alpha=1 / LOW)
    return total


def symmetric_product(A: Planes, B: Planes) -> Tensor:
    """As `product`, for B = ``A.mT``: with two products instead of three, and exactly symmetric."""
    half = _empty(A, B)
    _add_high(half, A, B, alpha=0.5)
    if A.lo is not None and B.lo is not None:
        _add(half, A.hi, B.lo, alpha=1 / LOW)  # its transpose is ``lo hi``
    return half + half.mT


def _empty(A: Planes, B: Planes) -> Tensor:
    return torch.empty(A.shape[0], A.shape[1], B.shape[2], dtype=torch.float32, device=A.hi.device)


def _add_high(total: Tensor, A: Planes, B: Planes, alpha: float = 1.0) -> None:
    """Store the product of the high planes in `total`."""
    for first in range(0, max(A.shape[2], 1), CHUNK):
        left, right = A.hi[:, :, first : first + CHUNK], B.hi[:, first : first + CHUNK]
        _add(total, left, right, beta=0.0 if first == 0 else 1.0, alpha=alpha)


def _add(total: Tensor, left: Tensor, right: Tensor, *, beta: float = 1.0, alpha: float) -> None:
    """Store ``beta total + alpha left @ right`` in `total`, which is not read if beta is 0."""
    torch.baddbmm(total, left, right, out_dtype=torch.float32, beta=beta, alpha=alpha, out=total)
