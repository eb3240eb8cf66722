"""Number formats for algorithms of matrix products: one interface for floats and fp16 planes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor

from ...errors import ConfigError
from ...ops import Planes, Steering, SymmetricProduct, gemm3, purify_step, split_planes, symm_gram, symm_square

Precision = Literal["float64", "float32", "fp16x3", "fp16"]
Operand = Tensor | Planes


@dataclass(frozen=True)
class Floats:
    """Products of ordinary tensors in one dtype."""

    dtype: torch.dtype
    eps: float

    def load(self, x: Tensor, *, bounded: bool = False) -> Operand:
        """Convert a tensor to this format; `bounded`: see `split_planes`."""
        return x.to(self.dtype)

    def times(self, x: Operand, factor: float) -> Operand:
        """Return ``factor x``."""
        return factor * cast(Tensor, x)

    def dense(self, x: Operand) -> Tensor:
        """Convert an operand to a tensor."""
        return cast(Tensor, x)

    def gram(self, x: Operand) -> Operand:
        """Return ``x^T x``."""
        plain = cast(Tensor, x)
        return plain.mT @ plain

    def measured(self, x: Operand) -> SymmetricProduct:
        """Return a symmetric operand with its trace and squared norm."""
        plain = cast(Tensor, x)
        return SymmetricProduct(plain, plain.diagonal(dim1=-2, dim2=-1).sum(-1), plain.square().sum((-2, -1)))

    def square(self, x: Operand, a: float, b: float) -> Operand:
        """Return ``a x + b x x`` for symmetric x."""
        plain = cast(Tensor, x)
        return a * plain + b * (plain @ plain)

    def scaled(self, x: Operand, steering: Steering) -> Steering:
        """Return the first steering of x as `step` takes it."""
        return steering

    def step(self, x: Operand, steering: Steering, out: Operand | None) -> tuple[Operand, Steering]:
        """Return the next matrices of a purification, and their steering; `out` may be written to."""
        plain = cast(Tensor, x)
        linear, quadratic = (factors[:, None, None] for factors in steering.factors)
        result = torch.where(steering.done[:, None, None] > 0, plain, linear * plain + quadratic * (plain @ plain))
        found = self.measured(result)
        return result, steering.following(found.trace, found.square_norm)

    def multiply(
        self, x: Operand, y: Operand, alpha: float = 1.0, beta: float = 0.0, z: Operand | None = None
    ) -> Operand:
        """Return ``alpha x y + beta z``."""
        result = alpha * (cast(Tensor, x) @ cast(Tensor, y))
        return result if z is None else result + beta * cast(Tensor, z)


@dataclass(frozen=True)
class FloatPlanes:
    """Products of fp16 planes on tensor cores, or their simulation; see `ops.Planes`."""

    low: bool
    eps: float

    def load(self, x: Tensor, *, bounded: bool = False) -> Operand:
        """Convert a tensor to this format; `bounded`: see `split_planes`."""
        return split_planes(x.float(), low=self.low, bounded=bounded)

    def times(self, x: Operand, factor: float) -> Operand:
        """Return ``factor x``, as accurate as x."""
        planes = cast(Planes, x)
        return Planes(planes.hi, planes.lo, planes.scale * factor)

    def dense(self, x: Operand) -> Tensor:
        """Convert an operand to a tensor."""
        return cast(Planes, x).dense()

    def gram(self, x: Operand) -> Operand:
        """Return ``x^T x``, whose entries must stay below 65504."""
        return symm_gram(cast(Planes, x), out_dtype="planes").matrix

    def measured(self, x: Operand) -> SymmetricProduct:
        """Return a symmetric operand with its trace and squared norm."""
        plain = cast(Planes, x).dense()
        trace, square_norm = plain.diagonal(dim1=-2, dim2=-1).sum(-1), plain.square().sum((-2, -1))
        return SymmetricProduct(x, trace, square_norm)

    def square(self, x: Operand, a: float, b: float) -> Operand:
        """Return ``a x + b x x`` for symmetric x."""
        return symm_square(cast(Planes, x), alpha=b, beta=a).matrix

    def scaled(self, x: Operand, steering: Steering) -> Steering:
        """Return the first steering of x as `step` takes it."""
        return steering.of_unscaled(cast(Planes, x).scale)

    def step(self, x: Operand, steering: Steering, out: Operand | None) -> tuple[Operand, Steering]:
        """Return the next matrices of a purification, and their steering; `out` may be written to."""
        return purify_step(cast(Planes, x), steering, out=cast(Planes | None, out))

    def multiply(
        self, x: Operand, y: Operand, alpha: float = 1.0, beta: float = 0.0, z: Operand | None = None
    ) -> Operand:
        """Return ``alpha x y + beta z``, whose entries must stay below 65504."""
        return gemm3(cast(Planes, x), cast(Planes, y), alpha, beta, z, out_dtype="planes")


Arithmetic = Floats | FloatPlanes


# Kernels copy planes whose sizes are no multiples of it, except on sm_100 and later, where it is twice as much.
ALIGNED = 32


def padded(x: Tensor, columns: int) -> Tensor:
    """Add columns of zeros up to the next multiple of `ALIGNED` from `columns` on."""
    return torch.nn.functional.pad(x, (0, -(-columns // ALIGNED) * ALIGNED - x.shape[-1]))


FORMATS: dict[str, Arithmetic] = {
    "float64": Floats(torch.float64, 2.0**-53),
    "float32": Floats(torch.float32, 2.0**-24),
    "fp16x3": FloatPlanes(True, 2.0**-23),
    "fp16": FloatPlanes(False, 2.0**-12),
}


def arithmetic(precision: Precision) -> Arithmetic:
    """Return the arithmetic of that name.

    ``fp16x3`` has float32's accuracy at a third of the fp16 rate of tensor cores, ``fp16`` that of tf32 at the full
    rate. On a CPU both are simulated by rounding: with the same accuracy, but slowly.

    Raises:
        ConfigError: no such format.
    """
    if precision not in FORMATS:
        raise ConfigError(f"precision must be one of {', '.join(FORMATS)}, got {precision!r}")
    return FORMATS[precision]
