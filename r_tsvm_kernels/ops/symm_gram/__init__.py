"""Gram matrices from planes."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ... import dispatch
from ...errors import ConfigError, DTypeError
from .._planes import OutDtype, Planes, SymmetricProduct, check_planes, factor


@dispatch.op("Products for tensor cores", cuda=("triton", "cublas", "torch"), accuracy=1e-6)
def symm_gram(
    planes: Planes,
    side: Literal["left", "right"] = "right",
    *,
    out_dtype: OutDtype = torch.float32,
    backend: str | None = None,
) -> SymmetricProduct:
    """Return ``A^T A`` (`side` right) or ``A A^T`` (left) with its trace and squared Frobenius norm.

    Three fp16 products per element (one without the low plane), accumulated in float32 (Ootomo and Yokota, arXiv
    2203.03341). Only the lower triangle is computed: the result is exactly symmetric. Kernels have the error of a
    float32 product, not the bits of the reference.

    Args:
        planes: (..., m, n).
        side: ``"right"`` gives (..., n, n), ``"left"`` gives (..., m, m).
        out_dtype: ``torch.float32``, or ``"planes"`` of scale 1, for entries below 65504.
        backend: run this implementation or raise; None takes the fastest one that is available.

    Returns:
        The matrices, their traces and squared norms, with the leading dimensions of `planes`.

    Raises:
        ShapeError, DTypeError, DeviceError: not planes as `split_planes` makes them, or another `out_dtype`.
        ConfigError: an unknown `side`.
        BackendUnavailableError: `backend` cannot run here.

    Examples:
        >>> from r_tsvm_kernels.ops import split_planes, symm_gram
        >>> planes = split_planes(torch.tensor([[3.0, 0.0], [4.0, 2.0]]))
        >>> product = symm_gram(planes)
        >>> product.matrix
        tensor([[25.,  8.],
                [ 8.,  4.]])
        >>> product.trace
        tensor(29.)
    """
    check_planes("symm_gram", planes)
    if side not in ("left", "right"):
        raise ConfigError(f"symm_gram: side must be 'left' or 'right', got {side!r}")
    if out_dtype not in (torch.float32, "planes"):
        raise DTypeError(f"symm_gram: out_dtype must be torch.float32 or 'planes', got {out_dtype!r}")
    run = dispatch.select("symm_gram", planes.hi, backend=backend)
    batch = planes.shape[:-2]
    flat = planes.flatten()
    result: SymmetricProduct = run(
        flat.mT if side == "right" else flat, factor("symm_gram", flat, flat.scale, flat.scale), out_dtype
    )
    matrix = result.matrix
    shaped = matrix.reshape(*batch, *matrix.shape[1:]) if isinstance(matrix, Tensor) else matrix.unflatten(batch)
    return SymmetricProduct(shaped, result.trace.reshape(batch), result.square_norm.reshape(batch))
