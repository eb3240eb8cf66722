"""Matrices as scaled fp16 planes: the format in which tensor cores multiply with float32 accuracy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..errors import DeviceError, DTypeError, ShapeError

# What the low plane is multiplied with, so that it does not underflow: 2^11, the precision of fp16.
LOW = 2048.0

# What a product stores: a dtype, or planes of scale 1.
OutDtype = torch.dtype | Literal["planes"]


@dataclass(frozen=True, repr=False)
class Planes:
    """A batch of matrices ``scale * (hi + lo / 2^11)`` (Ootomo and Yokota, arXiv 2203.03341).

    With both planes an element has 22 bits, with `hi` alone 11. What a product stores as planes has scale 1; its
    entries must then stay below 65504, which all uses here guarantee.

    Attributes:
        hi: (..., m, n) float16.
        lo: the same, or None: products then take one multiplication instead of three and have tf32's accuracy.
        scale: (...) float32, positive.
    """

    hi: Tensor
    lo: Tensor | None
    scale: Tensor

    def __repr__(self) -> str:
        return f"Planes({'x'.join(map(str, self.shape))}, {1 if self.lo is None else 2} of float16)"

    @property
    def shape(self) -> torch.Size:
        """Shape of the matrices, leading dimensions included."""
        return self.hi.shape

    @property
    def mT(self) -> Planes:
        """The transposed matrices, a view."""
        return Planes(self.hi.mT, None if self.lo is None else self.lo.mT, self.scale)

    def dense(self) -> Tensor:
        """Return the matrices in float32."""
        return self.unscaled() * self.scale[..., None, None]

    def unscaled(self) -> Tensor:
        """Return ``hi + lo / 2^11`` in float32."""
        return self.hi.float() if self.lo is None else torch.add(self.hi.float(), self.lo, alpha=1 / LOW)

    def flatten(self) -> Planes:
        """Return the same planes with one leading dimension."""
        shape = (self.scale.numel(), *self.shape[-2:])  # not -1: matrices may be empty
        lo = None if self.lo is None else self.lo.reshape(shape)
        return Planes(self.hi.reshape(shape), lo, self.scale.reshape(-1))

    def unflatten(self, batch: torch.Size) -> Planes:
        """Return the same planes with the leading dimensions `batch`."""
        shape = (*batch, *self.shape[-2:])
        lo = None if self.lo is None else self.lo.reshape(shape)
        return Planes(self.hi.reshape(shape), lo, self.scale.reshape(batch))


@dataclass(frozen=True)
class SymmetricProduct:
    """A batch of symmetric products and two sums over each.

    Attributes:
        matrix: (..., n, n), exactly symmetric.
        trace: (...) float32.
        square_norm: (...) float32, squared Frobenius norm.
    """

    matrix: Tensor | Planes
    trace: Tensor
    square_norm: Tensor


def split(x: Tensor, low: bool) -> tuple[Tensor, Tensor | None]:
    """Return the planes of float32 `x`, scale 1. Every step but the two roundings is exact."""
    hi = x.half()
    return hi, ((x - hi.float()) * LOW).half() if low else None


# Multiplies planes with one leading dimension, as `product` does.
Product = Callable[["Planes", "Planes"], Tensor]


def product(A: Planes, B: Planes) -> Tensor:
    """Return ``A @ B`` without the scales: ``hi hi + (hi lo + lo hi) / 2^11``, accumulated in float32."""
    high = A.hi.float() @ B.hi.float()
    if A.lo is None or B.lo is None:
        return high
    return high + (A.hi.float() @ B.lo.float() + A.lo.float() @ B.hi.float()) / LOW


def symmetric(lower: Tensor) -> Tensor:
    """Mirror the lower triangle, in place."""
    return lower.tril_().add_(lower.tril(-1).mT)


def check_planes(op: str, *planes: Planes) -> None:
    """Require fp16 planes on one device, of one kind (with or without `lo`) and the same leading dimensions."""
    first = planes[0]
    for given in planes:
        parts = [given.hi] if given.lo is None else [given.hi, given.lo]
        if any(part.dtype != torch.float16 for part in parts) or given.scale.dtype != torch.float32:
            raise DTypeError(f"{op}: planes are float16 with a float32 scale; make them with split_planes")
        if given.hi.ndim < 2 or given.scale.shape != given.shape[:-2] or any(p.shape != given.shape for p in parts):
            raise ShapeError(f"{op}: planes of shape {tuple(given.shape)}, scale of shape {tuple(given.scale.shape)}")
        if given.shape[:-2] != first.shape[:-2]:
            raise ShapeError(f"{op}: leading dimensions {tuple(given.shape[:-2])} and {tuple(first.shape[:-2])}")
        if (given.lo is None) != (first.lo is None):
            raise DTypeError(f"{op}: planes with and without a low part cannot be multiplied with each other")
        if any(part.device != first.hi.device for part in (*parts, given.scale)):
            raise DeviceError(f"{op}: the planes are on different devices; move them with .to()")


def factor(op: str, like: Planes, *values: float | Tensor) -> Tensor:
    """Return the product of `values`, one float32 number per matrix of `like`, which has one leading dimension."""
    count, total = like.scale.numel(), None
    for value in sorted(values, key=lambda value: not isinstance(value, Tensor)):
        if isinstance(value, Tensor) and value.numel() not in (1, count):
            raise ShapeError(f"{op}: expected one factor for each of {count} matrices, got {value.numel()}")
        own = value.reshape(-1) if isinstance(value, Tensor) else value
        if total is None:
            total = own if isinstance(own, Tensor) else like.scale.new_full((count,), own)
        elif isinstance(own, Tensor) or own != 1:  # every operation on a few numbers is a launch
            total = total * own
    return (like.scale.new_ones(count) if total is None else total).float().expand(count).contiguous()


def summed(value: Tensor, like: Planes, out_dtype: OutDtype) -> SymmetricProduct:
    """Return float32 `value` as float32 or as planes, with the sums over what is stored."""
    matrix: Tensor | Planes = value
    if out_dtype == "planes":
        planes = Planes(*split(value, like.lo is not None), torch.ones_like(like.scale))
        matrix, value = planes, planes.unscaled()
    trace = value.diagonal(dim1=-2, dim2=-1).double().sum(-1)
    return SymmetricProduct(matrix, trace.float(), value.double().square_().sum((-2, -1)).float())
