"""Kinds of tensors that callers have: those that ops and merges take, and those that they refuse."""

import numpy as np
import torch

from r_tsvm_kernels.errors import DeviceError, DTypeError


class Tagged(torch.Tensor):
    """A plain subclass, as libraries make them to carry metadata."""


class Wrapper(torch.Tensor):
    """Holds no values itself, as DTensor and quantised tensors do."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), keywords=None):
        raise AssertionError("must not be touched")


def strided(x):
    wide = x.new_zeros([3 * size for size in x.shape])
    return wide[tuple(slice(None, None, 3) for _ in x.shape)].copy_(x)


def at_an_odd_address(x):
    """Not even a multiple of the element size: code for aligned elements may do anything with it."""
    memory = bytearray(x.numel() * x.element_size() + 16)
    odd = 1 - torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % 2
    if x.numel() == 0:
        return x
    copy = torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=odd).view(x.shape).copy_(x)
    assert copy.data_ptr() % 2 == 1
    return copy


def negative_view(x):
    return torch.complex(x, -x).conj().imag if x.dtype in (torch.float32, torch.float64) else x


# Each takes a tensor and returns one with the same values.
TAKEN = {
    "parameter": lambda x: torch.nn.Parameter(x.clone()),
    "graph": lambda x: torch.nn.Parameter(x.clone()) * 1.0,
    "buffer": lambda x: torch.nn.Buffer(x.clone()),
    "subclass": lambda x: x.clone().as_subclass(Tagged),
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "strided": strided,
    "slice": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    "negative view": negative_view,
    "inference": lambda x: torch.inference_mode()(torch.clone)(x),
}
# Each makes of a matrix something that is refused, with this error and message.
REFUSED = {
    "sparse": (lambda x: x.to_sparse(), DTypeError, "expected a dense tensor, got torch.sparse_coo; .*to_dense"),
    "sparse rows": (lambda x: x.to_sparse_csr(), DTypeError, "expected a dense tensor, got torch.sparse_csr"),
    "nested": (lambda x: torch.nested.nested_tensor([x, x[:3]]), DTypeError, "expected a dense tensor, got nested"),
    "meta": (lambda x: x.to("meta"), DeviceError, "meta"),
    "wrapper": (Wrapper, DTypeError, "expected a plain tensor, got Wrapper; .*full_tensor"),
    "quantised": (
        lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
        DTypeError,
        "expected a plain tensor, got torch.qint8; .*dequantize",
    ),
    "complex": (lambda x: x.to(torch.complex64), DTypeError, "complex64"),
    "NumPy": (lambda x: np.asarray(x), DTypeError, "expected a torch.Tensor, got ndarray; use torch.as_tensor"),
    "list": (lambda x: x.tolist(), DTypeError, "expected a torch.Tensor, got list"),
    "None": (lambda x: None, DTypeError, "expected a torch.Tensor, got NoneType"),
}
