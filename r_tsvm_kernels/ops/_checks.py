"""Argument checks shared by the public op functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from ..errors import DeviceError, DTypeError, NonFiniteError, ShapeError

FLOAT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

# Elements of each tensor that are worked on at one time: what a core's cache holds, or what keeps a GPU busy.
TILE = {"cpu": 1 << 15, "cuda": 1 << 22}


def tile_elements(device_type: str) -> int:
    """Return how many elements of each tensor are taken at one time by what works piece by piece in torch."""
    return TILE.get(device_type, TILE["cuda"])


def check_group(base: Tensor | None, tuned: Sequence[Tensor], op: str) -> None:
    """Require at least one tuned tensor, all of `base`'s shape, on its device, in a dtype of `FLOAT_DTYPES`.

    Without a base the first tuned tensor takes its place.
    """
    if not tuned:
        raise ShapeError(f"{op}: expected at least one fine-tuned tensor, got none")
    base = tuned[0] if base is None else base
    for index, tensor in enumerate([base, *tuned]):
        label = "base" if index == 0 else f"tuned[{index - 1}]"
        if tensor.dtype not in FLOAT_DTYPES:
            expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOAT_DTYPES)
            raise DTypeError(f"{op}: {label} must be one of {expected}, got {tensor.dtype}; convert it with .to()")
        if tensor.shape != base.shape:
            raise ShapeError(f"{op}: {label} has shape {tuple(tensor.shape)}, the base has {tuple(base.shape)}")
        if tensor.device != base.device:
            raise DeviceError(f"{op}: {label} lies on {tensor.device}, the base on {base.device}; move it with .to()")


def check_like(tensor: Tensor, base: Tensor, label: str) -> None:
    """Require the shape and the device of `base` of a tensor that goes with it element by element."""
    if tensor.shape != base.shape:
        raise ShapeError(f"{label} has shape {tuple(tensor.shape)}, expected {tuple(base.shape)}")
    if tensor.device != base.device:
        raise DeviceError(f"{label} lies on {tensor.device}, expected {base.device}; move it with .to()")


def check_mask(mask: Tensor, base: Tensor, label: str) -> None:
    """Require booleans, of the shape and device of `base`."""
    if mask.dtype != torch.bool:
        raise DTypeError(f"{label} is of {mask.dtype}, expected torch.bool; convert it with .bool()")
    check_like(mask, base, label)


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
