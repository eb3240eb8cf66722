"""What the CUDA kernels share: tensors they can read, the stream they are queued on, memory they work in."""

from __future__ import annotations

import torch
from torch import Tensor


def flat(tensor: Tensor) -> Tensor:
    """Return `tensor`, or a contiguous copy: the kernels read memory in the order of the flat index."""
    return tensor.resolve_neg().contiguous()


def queue(tensor: Tensor) -> tuple[int, int]:
    """Return the index of the tensor's device and the address of its current stream."""
    stream = torch.cuda.current_stream(tensor.device)
    return stream.device_index, stream.cuda_stream


def workspace(size: int, tensor: Tensor) -> Tensor:
    """Return `size` bytes on the tensor's device; work queued later on its current stream may get them again."""
    return torch.empty(size, dtype=torch.uint8, device=tensor.device)
