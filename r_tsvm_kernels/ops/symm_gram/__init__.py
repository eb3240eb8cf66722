"""Gram matrices from planes."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from ... import dispatch
from ...errors import ConfigError
from .._planes import Output, Planes, SymmetricProduct, check_planes, factor


@dispatch.op("Products for tensor cores", cuda=("torch", "triton"), accuracy=1e-6)
def symm_gram(
    planes: Planes,
    side: Literal["left", "right"] = "right",
    *,
    out: Output = "float32",
    backend: str | None = None,
) -> SymmetricProduct:
    """Return ``A^T A`` (`side` right) or ``A A^T`` (left) with its trace and squared Frobenius norm.

    Three fp16 products per element (one without the low plane), accumulated in float32, half of them computed: the
    result is exactly symmetric. The kernel's error is that of a float32 product, not the same bits.

    Args:
        planes: (..., m, n).
        side: which factor comes transposed; right gives (..., n, n), left (..., m, m).
        out: ``float32``, or ``planes`` of scale 1, for entries below 65504.
        backend: run this implementation or raise; None takes the fastest one that is available.

    Raises:
        ShapeError, DTypeError, DeviceError: not planes as `split_planes` makes them.
        ConfigError: an unknown `side` or `out`.
        BackendUnavailableError: `backend` cannot run here.
    """
    check_planes("symm_gram", planes)
    if side not in ("left", "right") or out not in ("float32", "planes"):
        raise ConfigError(f"symm_gram: side must be left or right, out float32 or planes, got {side!r}, {out!r}")
    run = dispatch.select("symm_gram", planes.hi, backend=backend)
    batch = planes.shape[:-2]
    flat = planes.flatten()
    result: SymmetricProduct = run(
        flat.mT if side == "right" else flat, factor("symm_gram", flat, flat.scale, flat.scale), out
    )
    matrix = result.matrix
    shaped = matrix.reshape(*batch, *matrix.shape[1:]) if isinstance(matrix, Tensor) else matrix.unflatten(batch)
    return SymmetricProduct(shaped, result.trace.reshape(batch), result.square_norm.reshape(batch))
