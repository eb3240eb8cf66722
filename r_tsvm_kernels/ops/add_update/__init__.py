"""Add a merged update to the base weight."""

from __future__ import annotations

from torch import Tensor

from ... import dispatch
from .._checks import check_group


def add_update(base: Tensor, update: Tensor, alpha: float = 1.0, *, backend: str | None = None) -> Tensor:
    """Return ``base + alpha * update``; where ``alpha * update`` is 0 the base comes back bit for bit, -0.0 included.

    Args:
        base: any shape, float64, float32, float16 or bfloat16.
        update: the same shape and device.
        alpha: scale of the update.
        backend: run this implementation or raise; None takes the fastest one that is available.

    Returns:
        A new tensor, float32 (float64 if any input is float64): rounding to the storage dtype is left to the caller.

    Raises:
        ShapeError, DTypeError, DeviceError: the tensors do not match.
        BackendUnavailable: `backend` cannot run here.
    """
    check_group(base, [update], op="add_update")
    run = dispatch.select("add_update", base, update, backend=backend)
    result: Tensor = run(base, update, alpha)
    return result
