"""How tensors are passed to the native modules: as addresses, sizes and strides."""

from __future__ import annotations

import torch
from torch import Tensor

# Codes of r_tsvm::ElementType (csrc/include/r_tsvm/tensor_view.h).
ELEMENT_TYPES = {torch.float64: 0, torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}

# address, rows, cols, row stride in elements, element type code
Matrix = tuple[int, int, int, int, int]


def aligned(tensor: Tensor) -> Tensor:
    """Return `tensor`, or a copy if its address is no multiple of the element size (`torch.frombuffer` makes such)."""
    return tensor.clone() if tensor.data_ptr() % tensor.element_size() else tensor


def is_readable(tensor: Tensor) -> bool:
    """Whether the native modules can read the values of `tensor` without a copy; magnitudes, if its view is negated."""
    plain = tensor.dtype in ELEMENT_TYPES and tensor.layout == torch.strided
    return plain and not tensor.data_ptr() % tensor.element_size() and _rows(tensor) is not None


def with_rows(tensor: Tensor) -> Tensor:
    """Return `tensor`, or a copy if its elements do not form an aligned matrix with unit stride along the columns."""
    tensor = aligned(tensor.resolve_neg())
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
