"""Task statistics by the native CPU module (csrc/cpu/task_statistics.cpp)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import backends
from . import TaskStatistics

# Codes of r_tsvm::ElementType (csrc/include/r_tsvm/tensor_view.h).
ELEMENT_TYPES = {torch.float64: 0, torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}

Matrix = tuple[int, int, int, int, int]
Addresses = tuple[int, int, int, int, int, int, int]


def run(base: Tensor, tuned: Sequence[Tensor], sigma: float, eps: float) -> TaskStatistics:
    """See `task_statistics`. The bits of the result do not depend on strides or on the number of threads."""
    tensors = [with_rows(tensor) for tensor in (base, *tuned)]
    views = [matrix(tensor) for tensor in tensors]
    result, addresses = allocate(base, len(tuned))
    backends.native("cpu").task_statistics(views[0], views[1:], sigma, eps, addresses, torch.get_num_threads())
    return result


def allocate(base: Tensor, tasks: int) -> tuple[TaskStatistics, Addresses]:
    """Return uninitialised statistics and the addresses of mean, sd, max, zeros, theta, outlier_mass and small."""
    mean, sd, largest, theta, outlier_mass = torch.empty((5, tasks), dtype=torch.float64, device=base.device).unbind()
    zeros, small = torch.empty((2, tasks), dtype=torch.int64, device=base.device).unbind()
    outputs = (mean, sd, largest, zeros, theta, outlier_mass, small)
    addresses = tuple(tensor.data_ptr() for tensor in outputs)
    return TaskStatistics(base.numel(), *outputs), addresses  # type: ignore[return-value]


def with_rows(tensor: Tensor) -> Tensor:
    """Return `tensor`, or a contiguous copy if its elements do not form a matrix with unit stride along the columns."""
    tensor = tensor.resolve_neg()
    return tensor if tensor.numel() == 0 or _rows(tensor) is not None else tensor.contiguous()


def matrix(tensor: Tensor) -> Matrix:
    """Return address, rows, cols, row stride in elements and element type code of a tensor from `with_rows`."""
    rows, cols, row_stride = _rows(tensor) or (1, tensor.numel(), tensor.numel())
    return tensor.data_ptr(), rows, cols, row_stride, ELEMENT_TYPES[tensor.dtype]


def _rows(tensor: Tensor) -> tuple[int, int, int] | None:
    """Return (rows, cols, row stride) if the flat order of `tensor` is that of such a matrix; one row if contiguous."""
    if tensor.is_contiguous():
        return 1, tensor.numel(), tensor.numel()
    dims: list[tuple[int, int]] = []  # (size, stride) of dimensions that cannot be merged, outermost first
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        if size == 1:
            continue
        if dims and dims[-1][1] == size * stride:
            dims[-1] = (dims[-1][0] * size, stride)
        else:
            dims.append((size, stride))
    if len(dims) == 2 and dims[1][1] == 1:
        return dims[0][0], dims[1][0], dims[0][1]
    return None
