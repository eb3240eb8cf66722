"""Split float32 matrices into scaled fp16 planes."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import dispatch
from ...errors import DTypeError, ShapeError
from .._checks import check_plain
from .._planes import Planes


@dispatch.op("Products for tensor cores", cuda=("triton", "torch"), small={"BLOCK": 128})
def split_planes(x: Tensor, *, low: bool = True, bounded: bool = False, backend: str | None = None) -> Planes:
    """Return ``hi = fp16(x / scale)`` and ``lo = fp16((x / scale - hi) * 2^11)`` (arXiv 2203.03341, section 4).

    The scale is a power of two, one per matrix, with ``|x| / scale <= 1``; 1 for a matrix of zeros. Then x is
    reproduced to 2^-22 of each element or 2^-36 of the largest one, whichever is larger. (The largest scale is 2^126.
    Above it ``|x| / scale`` is up to 4, which fp16 can represent.) The planes of a matrix with NaN or infinity are not
    finite.

    Args:
        x: (..., m, n) float32.
        low: False omits `lo`: 11 bits instead of 22, a third of the work.
        bounded: the scale is 1, without a search for the largest element, which must be below 65504. Elements below
            2^-14 then lose digits.
        backend: run this implementation or raise; None takes the fastest one that is available.

    Returns:
        Planes of the shape of x, with one scale per matrix.

    Raises:
        ShapeError, DTypeError: not float32 matrices.
        BackendUnavailableError: `backend` cannot run here.

    Examples:
        >>> planes = split_planes(torch.tensor([[3.0, 0.1]]))
        >>> planes.hi
        tensor([[0.7500, 0.0250]], dtype=torch.float16)
        >>> planes.scale, planes.dense()
        (tensor(4.), tensor([[3.0000, 0.1000]]))
    """
    check_plain(x, "split_planes: x")
    x = x.detach()
    if x.ndim < 2:
        raise ShapeError(f"split_planes: expected matrices, got shape {tuple(x.shape)}")
    if x.dtype != torch.float32:
        raise DTypeError(f"split_planes: expected float32, got {x.dtype}; convert it with .float()")
    planes: Planes = dispatch.select("split_planes", x, backend=backend)(
        x, x.new_ones(x.shape[:-2]) if bounded else plane_scale(x), low
    )
    return planes


def plane_scale(x: Tensor) -> Tensor:
    """Return the power of two of each matrix, see `split_planes`."""
    if x.numel() == 0:
        return x.new_ones(x.shape[:-2])
    return scale_above(torch.linalg.vector_norm(x, torch.inf, dim=(-2, -1)))


def scale_above(largest: Tensor) -> Tensor:
    """Return the least power of two not below each of these float32 magnitudes; 1 for 0, NaN and infinity."""
    bits = largest.nan_to_num(0.0, posinf=0.0).view(torch.int32)
    # A number is a power of two if the 23 bits of its mantissa are 0; adding 2^23 - 1 carries the others upwards.
    power = ((bits + 0x7FFFFF) & 0x7F800000).clamp(max=(126 + 127) << 23)
    return torch.where(bits > 0, power.view(torch.float32), 1.0)
