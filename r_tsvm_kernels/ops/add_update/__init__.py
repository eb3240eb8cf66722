"""Add a merged update to the base weight."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import dispatch
from .._checks import accumulation_dtype, check_factors, check_group, check_out_dtype, numbers_of


@dispatch.op("Sparse task vectors and elections", cpu=("cpu", "torch"), cuda=("triton", "torch"), small={"BLOCK": 128})
def add_update(
    base: Tensor,
    update: Tensor,
    alpha: float = 1.0,
    *,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """Return ``base + alpha * update``; where ``alpha * update`` is 0, the bits of the base, including -0.0.

    The last step of every merge: ``W = W_0 + alpha D`` with the merged task vector D.

    Args:
        base: any shape, float64, float32, float16 or bfloat16.
        update: the same shape and device; the dtype may differ.
        alpha: scale of the update, a finite number.
        out_dtype: dtype that the result is rounded to once, float64, float32, float16 or bfloat16; what does not fit
            becomes infinite. None means the accumulation dtype.
        backend: run this implementation or raise; None takes the fastest one that is available.

    Returns:
        A new tensor of the base's shape, in `out_dtype`; without one float32 (float64 if any input is float64), the
        accumulation dtype.

    Raises:
        ShapeError, DTypeError, DeviceError: the tensors do not match; `out_dtype` is checked, too.
        ConfigError: `alpha` is not finite, or does not fit the dtype of the result.
        BackendUnavailableError: `backend` cannot run here.

    Examples:
        >>> add_update(torch.tensor([1.0, -0.0]), torch.tensor([2.0, 0.0]), 0.5)
        tensor([2., -0.])
    """
    check_group(base, [update], op="add_update")
    (alpha,) = numbers_of(alpha, 1, "add_update: alpha")
    dtype = accumulation_dtype(base, update)
    check_factors([alpha], dtype, "add_update: alpha")
    check_out_dtype(out_dtype, "add_update")
    run = dispatch.select("add_update", base, update, backend=backend)
    result: Tensor = run(base, update, alpha, out_dtype or dtype)
    return result
