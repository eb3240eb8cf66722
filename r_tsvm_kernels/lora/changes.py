"""What adapters do to weights beside adding a product of two factors: each change gives the tuned tensor of a base."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from ..errors import ShapeError
from ..linalg import Factored
from ..ops._checks import accumulation_dtype

Self = TypeVar("Self", bound="Change")


class Change(Protocol):
    """A change of one weight."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors of the adapter that describe it."""

    def to(self: Self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """Return it on a device."""

    def applied(self, base: Tensor) -> Tensor:
        """Return the tuned weight."""


@dataclass(frozen=True)
class Replaced:
    """Another value: of `modules_to_save` and trained biases."""

    values: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The new value."""
        return (self.values,)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Replaced:
        """Return it on a device."""
        return Replaced(self.values.to(device, non_blocking=non_blocking))

    def applied(self, base: Tensor) -> Tensor:
        """Return the new value."""
        return self.values


@dataclass(frozen=True)
class ReplacedRows:
    """Other rows: trained tokens of an embedding."""

    indices: tuple[int, ...]
    rows: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The new rows."""
        return (self.rows,)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> ReplacedRows:
        """Return it on a device."""
        return ReplacedRows(self.indices, self.rows.to(device, non_blocking=non_blocking))

    def applied(self, base: Tensor) -> Tensor:
        """Return the base with the new rows, in the wider of both dtypes."""
        dtype = torch.promote_types(base.dtype, self.rows.dtype)
        tuned = base.to(dtype, copy=True)
        tuned[list(self.indices)] = self.rows.to(dtype)
        return tuned


@dataclass(frozen=True)
class Convolution:
    """A product of two convolutions, (out, r, 1, ...) and (r, in, k, ...), as PEFT adapts convolutions."""

    update: Factored
    shape: tuple[int, ...]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Both factors."""
        return self.update.left, self.update.right

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Convolution:
        """Return it on a device."""
        return Convolution(self.update.to(device, non_blocking=non_blocking), self.shape)

    def applied(self, base: Tensor) -> Tensor:
        """Return the base plus the update."""
        dtype = accumulation_dtype(base, self.update.left)
        return base.to(dtype) + self.update.dense().to(dtype).view(base.shape)


@dataclass(frozen=True)
class Dora:
    """DoRA: the base plus an update, with rows scaled to given norms (Liu et al., arXiv 2402.09353).

    ``W = diag(m / norms) (W_0 + scale B A)``, where the norms are those of the rows of the sum, (out, in).
    """

    update: Factored
    magnitude: Tensor
    transposed: bool

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Both factors and the norms."""
        return self.update.left, self.update.right, self.magnitude

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Dora:
        """Return it on a device."""
        update = self.update.to(device, non_blocking=non_blocking)
        return Dora(update, self.magnitude.to(device, non_blocking=non_blocking), self.transposed)

    def applied(self, base: Tensor) -> Tensor:
        """Return the scaled sum."""
        dtype = accumulation_dtype(base, self.update.left)
        start = (base.mT if self.transposed else base).to(dtype)
        left, right = self.update.left.to(dtype) * self.update.scale, self.update.right.to(dtype)
        tuned = torch.addmm(start, left, right)
        factors = self.magnitude.to(dtype).flatten() / torch.linalg.vector_norm(tuned, dim=1)
        if factors.shape != tuned.shape[:1]:
            raise ShapeError(f"DoRA: {factors.numel()} magnitudes for {len(tuned)} rows")
        tuned.mul_(factors.unsqueeze(1))
        return tuned.mT.contiguous() if self.transposed else tuned
