"""Tensors on devices other than CPUs and CUDA, such as Apple's ``mps``: computed with on the CPU, and moved back.

These devices lack what the definitions of our ops need, ``mps`` for one float64. On Apple's chips both share the
memory, so that a move is a copy.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import is_dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

if TYPE_CHECKING:
    import torch

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

# Device types that are computed on, and one that has no values and is refused.
_OWN = ("cpu", "cuda", "meta")


def on_own_device(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Make a function of tensors take them on foreign devices, too.

    If the first tensor among the arguments, or in a list among them, is on such a device, all arguments are moved to
    the CPU and all tensors of the result back. A tensor that the device cannot hold, as float64 on ``mps``, stays on
    the CPU.
    """

    @wraps(function)
    def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        device = foreign_device(args) or foreign_device(tuple(kwargs.values()))
        if device is None:
            return function(*args, **kwargs)
        import torch

        there, cpu = str(device), torch.device("cpu")
        here = [_moved(value, lambda tensor: _from(there, tensor).to(cpu)) for value in (args, kwargs)]
        result: Result = _moved(function(*here[0], **here[1]), lambda tensor: _placed(tensor, device))
        return result

    return run


def foreign_device(values: tuple[Any, ...]) -> torch.device | None:
    """Return the device of the first tensor among values, or in a list among them, if it is foreign."""
    for value in values:
        first = value
        while isinstance(first, list | tuple) and first:
            first = first[0]
        device = getattr(first, "device", None)
        kind = getattr(device, "type", None)
        if kind is not None and device is not None:
            return None if kind in _OWN else device
    return None


def _from(device: str, tensor: torch.Tensor) -> torch.Tensor:
    from .errors import DeviceError

    if str(tensor.device) != device:
        raise DeviceError(f"all tensors must be on one device, got {device} and {tensor.device}; move them with .to()")
    return tensor


def _placed(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    try:
        return tensor.to(device)
    except TypeError:  # a dtype that the device lacks
        return tensor


def _moved(value: Any, move: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Return the value with every tensor in it moved."""
    import torch

    if isinstance(value, torch.Tensor):
        return move(value)
    if isinstance(value, list | tuple):
        items = [_moved(item, move) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        return {key: _moved(item, move) for key, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        made = copy.copy(value)
        for name, item in vars(value).items():  # the fields, and properties that were computed from them
            object.__setattr__(made, name, _moved(item, move))
        return made
    return value
