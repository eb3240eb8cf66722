"""General products of planes."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from ... import dispatch
from ...errors import DTypeError, ShapeError
from .._planes import OutDtype, Planes, check_planes, factor

OUT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@overload
def gemm3(
    A: Planes, B: Planes, alpha: float | Tensor = ..., beta: float | Tensor = ..., C: Tensor | Planes | None = ...,
    *, out_dtype: torch.dtype = ..., backend: str | None = ...,
) -> Tensor: ...  # fmt: skip
@overload
def gemm3(
    A: Planes, B: Planes, alpha: float | Tensor = ..., beta: float | Tensor = ..., C: Tensor | Planes | None = ...,
    *, out_dtype: Literal["planes"], backend: str | None = ...,
) -> Planes: ...  # fmt: skip
@dispatch.op("Products for tensor cores", cuda=("triton", "cublas", "torch"), accuracy=1e-6)
def gemm3(
    A: Planes,
    B: Planes,
    alpha: float | Tensor = 1.0,
    beta: float | Tensor = 1.0,
    C: Tensor | Planes | None = None,
    *,
    out_dtype: OutDtype = torch.float32,
    backend: str | None = None,
) -> Tensor | Planes:
    """Return ``alpha A @ B + beta C``, rounded once to the output format.

    Three fp16 products per element (one without low planes), accumulated in float32 (Ootomo and Yokota, arXiv
    2203.03341). Kernels have the error of a float32 product, not the bits of the reference. Fastest where m, k and n
    are multiples of 64: kernels copy other matrices and fill them up with zeros.

    Args:
        A: (..., m, k); ``A.mT`` for a transposed factor.
        B: (..., k, n).
        alpha: factor of the product: a number, or a float32 tensor (...), one per matrix.
        beta: factor of C, in the same form.
        C: (..., m, n) float32, float16, bfloat16 or planes; None omits the term.
        out_dtype: float32, float16 or bfloat16 (a base weight as C and its dtype here give the merged weight), or
            ``"planes"`` of scale 1, for entries below 65504.
        backend: run this implementation or raise; None takes the fastest one that is available.

    Returns:
        (..., m, n) of `out_dtype`.

    Raises:
        ShapeError, DTypeError, DeviceError: operands that do not fit each other, or an unknown `out_dtype`.
        BackendUnavailableError: `backend` cannot run here.

    Examples:
        >>> from r_tsvm_kernels.ops import gemm3, split_planes
        >>> A, B = (split_planes(torch.tensor(x)) for x in ([[1.0, 2.0]], [[3.0], [4.0]]))
        >>> gemm3(A, B, 0.5)
        tensor([[5.5000]])
    """
    check_planes("gemm3", A, B, *([C] if isinstance(C, Planes) else []))
    batch, (m, k), (k_of_b, n) = A.shape[:-2], A.shape[-2:], B.shape[-2:]
    if k != k_of_b or (C is not None and C.shape != (*batch, m, n)):
        third = "" if C is None else f" and add {tuple(C.shape)}"
        raise ShapeError(f"gemm3: cannot multiply {tuple(A.shape)} by {tuple(B.shape)}{third}")
    if out_dtype != "planes" and out_dtype not in OUT_DTYPES:
        raise DTypeError(f"gemm3: out_dtype must be 'planes' or one of {OUT_DTYPES}, got {out_dtype!r}")
    if isinstance(C, Tensor) and C.dtype not in OUT_DTYPES:
        raise DTypeError(f"gemm3: C must be planes or one of {OUT_DTYPES}, got {C.dtype}")
    left, right = A.flatten(), B.flatten()
    scale = factor("gemm3", left, alpha, left.scale, right.scale)
    added = C.flatten() if isinstance(C, Planes) else None if C is None else C.reshape(-1, m, n)
    share = factor("gemm3", left, beta, *([added.scale] if isinstance(added, Planes) else []))
    run = dispatch.select("gemm3", A.hi, *([C] if isinstance(C, Tensor) else []), backend=backend)
    result = run(left, right, scale, share, added, out_dtype)
    return result.unflatten(batch) if isinstance(result, Planes) else result.reshape(*batch, m, n)
