"""A quadratic polynomial of a symmetric matrix, the step of spectral purification."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import dispatch
from ...errors import DTypeError, ShapeError
from .._checks import check_apart
from .._planes import Planes, SymmetricProduct, check_planes, factor


@dispatch.op("Products for tensor cores", cuda=("triton", "cublas", "torch"), accuracy=1e-6)
def symm_square(
    planes: Planes,
    alpha: float | Tensor,
    beta: float | Tensor,
    *,
    done: Tensor | None = None,
    out: SymmetricProduct | None = None,
    backend: str | None = None,
) -> SymmetricProduct:
    """Return ``alpha X X + beta X`` for symmetric X as planes of scale 1, with trace and squared Frobenius norm.

    Accuracy as `symm_gram`; only the lower triangle of the product is computed. All arguments may be in device memory,
    so a loop of such steps never waits, and the cost of converged matrices is negligible.

    Args:
        planes: (..., n, n), exactly symmetric. The entries of the result must stay below 65504.
        alpha: factor of the product: a number, or a float32 tensor (...), one per matrix.
        beta: factor of X, in the same form.
        done: (...) int32. 0: compute. 1: copy X. 2 or more: `out` already holds a copy, write nothing.
        out: an earlier result of the same shape whose memory is used again; not the one that holds `planes`.
        backend: run this implementation or raise; None takes the fastest one that is available.

    Returns:
        The matrices as planes of scale 1, their traces and squared norms, with the leading dimensions of `planes`.

    Raises:
        ShapeError, DTypeError, DeviceError: not square planes, or arguments that do not fit them.
        ConfigError: `out` shares memory with `planes`.
        BackendUnavailableError: `backend` cannot run here.

    Examples:
        A step towards the projector on the large eigenvalues, ``2 X - X X``:

        >>> from r_tsvm_kernels.ops import split_planes, symm_square
        >>> planes = split_planes(torch.tensor([[0.5, 0.0], [0.0, 1.0]]))
        >>> symm_square(planes, -1.0, 2.0).matrix.dense()
        tensor([[0.7500, 0.0000],
                [0.0000, 1.0000]])
    """
    check_planes("symm_square", planes)
    batch, n = planes.shape[:-2], planes.shape[-1]
    if planes.shape[-2] != n:
        raise ShapeError(f"symm_square: expected square matrices, got shape {tuple(planes.shape)}")
    if done is not None and (done.shape != batch or done.dtype != torch.int32):
        raise DTypeError(
            f"symm_square: done must be int32 of shape {tuple(batch)}, got {done.dtype} {tuple(done.shape)}"
        )
    flat = planes.flatten()
    old = None
    if out is not None:
        if not isinstance(out.matrix, Planes) or out.matrix.shape != planes.shape:
            raise ShapeError("symm_square: out must be a result of symm_square for planes of this shape")
        check_planes("symm_square", planes, out.matrix)
        given = {"planes": planes, "out": out.matrix}
        parts = {f"{name}.{part}": getattr(x, part) for name, x in given.items() for part in ("hi", "lo")}
        check_apart({name: part for name, part in parts.items() if part is not None}, op="symm_square")
        old = SymmetricProduct(out.matrix.flatten(), out.trace.reshape(-1), out.square_norm.reshape(-1))
    linear = factor("symm_square", flat, beta, flat.scale)
    quadratic = factor("symm_square", flat, alpha, flat.scale, flat.scale)
    run = dispatch.select("symm_square", planes.hi, backend=backend)
    result = run(flat, linear, quadratic, None if done is None else done.reshape(-1), old)
    return SymmetricProduct(
        result.matrix.unflatten(batch), result.trace.reshape(batch), result.square_norm.reshape(batch)
    )
