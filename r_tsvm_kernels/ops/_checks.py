"""Argument checks shared by the public op functions."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from numbers import Real
from typing import Any, NoReturn

import torch
from torch import Tensor

from .. import backends
from ..errors import ConfigError, DeviceError, DTypeError, NonFiniteError, ShapeError
from ..text import dtype_name
from ._native import is_readable, matrix

FLOAT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

# Elements of each tensor that are worked on at one time: what a core's cache holds, or what keeps a GPU busy.
TILE = {"cpu": 1 << 15, "cuda": 1 << 22}


def tile_elements(device_type: str) -> int:
    """Return how many elements of each tensor are taken at one time by what works piece by piece in torch."""
    return TILE.get(device_type, TILE["cuda"])


def check_plain(tensor: object, label: str) -> None:
    """Require a tensor with values in memory of its own, as kernels read them.

    Raises:
        DTypeError: not a tensor; or one that is sparse, nested or quantised, or a wrapper around others (DTensor).
    """
    if not isinstance(tensor, Tensor):
        numbers = isinstance(tensor, Real | list | tuple) or hasattr(tensor, "__array__")
        advice = "; use torch.as_tensor" if numbers else ""
        raise DTypeError(f"{label}: expected a torch.Tensor, got {type(tensor).__name__}{advice}")
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        advice = "gather it with .full_tensor(), or convert it with .dequantize()"
        raise DTypeError(f"{label}: expected a plain tensor, got {type(tensor).__name__}; {advice}")
    if tensor.layout != torch.strided or tensor.is_nested:
        kind = "nested" if tensor.is_nested else str(tensor.layout)
        raise DTypeError(f"{label}: expected a dense tensor, got {kind}; convert it with .to_dense()")
    if tensor.is_quantized:
        raise DTypeError(f"{label}: expected a plain tensor, got {tensor.dtype}; convert it with .dequantize()")


def check_floating(tensor: object, label: str) -> None:
    """Require a plain tensor of a dtype of `FLOAT_DTYPES`."""
    check_plain(tensor, label)
    assert isinstance(tensor, Tensor)
    if tensor.dtype not in FLOAT_DTYPES:
        expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOAT_DTYPES)
        raise DTypeError(f"{label} must be one of {expected}, got {tensor.dtype}; convert it with .to()")


def check_list(values: object, what: str, label: str) -> None:
    """Raise `DTypeError` unless it is a sequence: one tensor alone is the usual mistake."""
    if not isinstance(values, Sequence):
        several = isinstance(values, Iterable) and not isinstance(values, Tensor | Mapping)  # a generator, a ModuleList
        advice = "convert it with list()" if several else "put it in a list"
        raise DTypeError(f"{label}: expected a list of {what}, got {type(values).__name__}; {advice}")


def check_group(base: Tensor | None, tuned: Sequence[Tensor], op: str, *, optional_base: bool = False) -> None:
    """Require at least one tuned tensor, all of `base`'s shape, on its device, in a dtype of `FLOAT_DTYPES`.

    Where the base is optional and there is none, the first tuned tensor takes its place.
    """
    check_list(tuned, "fine-tuned tensors", op)
    if not tuned:
        raise ShapeError(f"{op}: expected at least one fine-tuned tensor, got none")
    base = tuned[0] if base is None and optional_base else base
    check_floating(base, f"{op}: base")
    assert base is not None
    for index, tensor in enumerate(tuned):
        label = f"tuned[{index}]"
        check_floating(tensor, f"{op}: {label}")
        if tensor.shape != base.shape:
            raise ShapeError(f"{op}: {label} has shape {tuple(tensor.shape)}, the base has {tuple(base.shape)}")
        if tensor.device != base.device:
            raise DeviceError(f"{op}: {label} is on {tensor.device}, the base on {base.device}; move it with .to()")


def check_out_dtype(dtype: torch.dtype | None, op: str) -> None:
    """Require a dtype of `FLOAT_DTYPES`, or None."""
    if dtype not in (None, *FLOAT_DTYPES):
        raise DTypeError(f"{op}: out_dtype must be {', '.join(map(dtype_name, FLOAT_DTYPES))}, got {dtype!r}")


def check_like(tensor: Tensor, base: Tensor, label: str) -> None:
    """Require the shape and the device of `base` for a tensor that is used element by element with it."""
    if tensor.shape != base.shape:
        raise ShapeError(f"{label} has shape {tuple(tensor.shape)}, expected {tuple(base.shape)}")
    if tensor.device != base.device:
        raise DeviceError(f"{label} is on {tensor.device}, expected {base.device}; move it with .to()")


def check_mask(mask: Tensor, base: Tensor, label: str) -> None:
    """Require booleans, of the shape and device of `base`."""
    if mask.dtype != torch.bool:
        raise DTypeError(f"{label} is of {mask.dtype}, expected torch.bool; convert it with .bool()")
    check_like(mask, base, label)


def check_apart(tensors: Mapping[str, Tensor], op: str) -> None:
    """Require that no two of these tensors, some of which are written to, share memory; strides may be any.

    Raises:
        ConfigError: two do.
    """
    spans = []
    for label, tensor in tensors.items():
        first = tensor.data_ptr()
        if first and tensor.numel():
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            spans.append((str(tensor.device), first, first + (last + 1) * tensor.itemsize, label))
    for before, after in pairwise(sorted(spans)):
        if before[0] == after[0] and after[1] < before[2]:
            raise ConfigError(f"{op}: {before[3]} and {after[3]} share memory; give one of them as .clone()")


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite. Waits for the device."""
    return math.isfinite(_largest_magnitude(tensor))


def check_finite(tensor: Tensor, label: str) -> float:
    """Raise `NonFiniteError` naming `label` if `tensor` holds NaN or infinity, else return its largest magnitude.

    Reads the tensor once; waits for the device. The largest magnitude of an empty tensor is 0.
    """
    largest = _largest_magnitude(tensor)
    if not math.isfinite(largest):
        raise_not_finite(label, int(tensor.numel() - torch.isfinite(tensor).sum()), tensor.numel())
    return largest


def _largest_magnitude(tensor: Tensor) -> float:
    """Return the largest magnitude: NaN if a value is."""
    if not tensor.numel():
        return 0.0
    if tensor.device.type == "cpu" and is_readable(tensor) and backends.state("cpu") == backends.READY:
        found: float = backends.native("cpu").largest_magnitude(matrix(tensor), torch.get_num_threads())
        return found
    return max(abs(float(bound)) for bound in torch.aminmax(tensor.detach()))


def raise_not_finite(label: str, bad: int, numel: int) -> NoReturn:
    """Raise `NonFiniteError`: `bad` of the `numel` values of `label` are NaN or infinite."""
    raise NonFiniteError(
        f"{label}: {bad} of {numel} values are NaN or infinite; "
        "a merge of such a tensor has no meaning: repair the checkpoint or exclude the tensor"
    )


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the dtype task vectors are formed in: float32, or float64 if any input is float64."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def plain_values(value: Any) -> Any:
    """Return the value with Python's numbers in place of NumPy's and torch's, in lists and mappings too."""
    if isinstance(value, Tensor) or type(value).__module__ == "numpy":
        return value.tolist()
    if isinstance(value, dict):
        return {key: plain_values(item) for key, item in value.items()}
    return type(value)(map(plain_values, value)) if type(value) in (list, tuple) else value


def numbers_of(values: object, tasks: int, label: str) -> list[float]:
    """Return one finite float per task: from a sequence, an array or a tensor of so many, or from one for all.

    Raises:
        ConfigError: another number of values, or one that is no finite number.
    """
    values = plain_values(values)
    given = [values] * tasks if isinstance(values, Real) else values
    if not isinstance(given, Sequence) or not all(isinstance(value, Real) for value in given):
        raise ConfigError(f"{label}: expected a number, or one for each of {tasks} tasks, got {values!r}")
    if len(given) != tasks:
        raise ConfigError(f"{label}: {tasks} tasks but {len(given)} numbers; give one for each, or one for all")
    found = [float(value) for value in given]
    if not all(math.isfinite(value) for value in found):
        raise ConfigError(f"{label}: expected finite numbers, got {found}")
    return found


def whole(value: Any, label: str) -> int:
    """Return a whole number, of Python, NumPy or torch, as int.

    Raises:
        ConfigError: not a whole number.
    """
    try:
        return operator.index(value)
    except TypeError:
        raise ConfigError(f"{label} must be a whole number, got {value!r}") from None


def check_factors(factors: Sequence[float], dtype: torch.dtype, label: str) -> None:
    """Require factors of task vectors, and the sum of their magnitudes, to fit the dtype that is computed in.

    Raises:
        ConfigError: one is not finite, or they are too large.
    """
    if not sum(map(abs, factors)) <= torch.finfo(dtype).max:
        given, name = ", ".join(f"{factor:g}" for factor in factors), str(dtype).removeprefix("torch.")
        raise ConfigError(f"{label} ({given}): expected finite numbers that fit {name}; choose smaller ones")
