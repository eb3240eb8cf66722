"""Argument checks shared by the public op functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from ..errors import DeviceError, DTypeError, NonFiniteError, ShapeError

FLOAT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def check_group(base: Tensor, tuned: Sequence[Tensor], op: str) -> None:
    """Require at least one tuned tensor, all of `base`'s shape, on its device, in a dtype of `FLOAT_DTYPES`."""
    if not tuned:
        raise ShapeError(f"{op}: expected at least one fine-tuned tensor, got none")
    for index, tensor in enumerate([base, *tuned]):
        label = "base" if index == 0 else f"tuned[{index - 1}]"
        if tensor.dtype not in FLOAT_DTYPES:
            expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOAT_DTYPES)
            raise DTypeError(f"{op}: {label} must be one of {expected}, got {tensor.dtype}; convert it with .to()")
        if tensor.shape != base.shape:
            raise ShapeError(f"{op}: {label} has shape {tuple(tensor.shape)}, the base has {tuple(base.shape)}")
        if tensor.device != base.device:
            raise DeviceError(f"{op}: {label} lies on {tensor.device}, the base on {base.device}; move it with .to()")


def check_finite(tensor: Tensor, label: str) -> None:
    """Raise `NonFiniteError` naming `label` if `tensor` holds NaN or infinity. Waits for the device."""
    if tensor.numel() == 0:
        return
    smallest, largest = torch.aminmax(tensor)
    if not (torch.isfinite(smallest) and torch.isfinite(largest)):
        raise_not_finite(label, int(tensor.numel() - torch.isfinite(tensor).sum()), tensor.numel())


def raise_not_finite(label: str, bad: int, numel: int) -> NoReturn:
    """Raise `NonFiniteError`: `bad` of the `numel` values of `label` are NaN or infinite."""
    raise NonFiniteError(
        f"{label}: {bad} of {numel} values are NaN or infinite; "
        "a merge of such a tensor has no meaning: repair the checkpoint or exclude the tensor"
    )


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the dtype task vectors are formed in: float32, or float64 if any input is float64."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
