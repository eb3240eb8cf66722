"""Write safetensors shards one tensor at a time.

Shapes and dtypes are known before the first value, so the header goes first and every tensor is written once, straight
to its place: no shard is ever held in memory.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

import torch
from torch import Tensor

from ..errors import CheckpointError
from .reader import DTYPES

Result = TypeVar("Result")
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """What will be written: dtype and shape."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of the values in bytes."""
        return self.dtype.itemsize * math.prod(self.shape)


def plan_shards(specs: Mapping[str, TensorSpec], shard_bytes: int) -> list[list[str]]:
    """Distribute tensors over shards, in order, each at most `shard_bytes` unless one tensor alone is larger.

    Within a shard wide dtypes come first, which keeps every tensor aligned to its own size.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for name, spec in specs.items():
        if shards[-1] and filled + spec.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += spec.nbytes
    return [sorted(shard, key=lambda name: -specs[name].dtype.itemsize) for shard in shards]


def shard_name(stem: str, index: int, count: int) -> str:
    """Return the file name of shard `index` (from 0) of `count`."""
    return f"{stem}.safetensors" if count == 1 else f"{stem}-{index + 1:05d}-of-{count:05d}.safetensors"


class ShardWriter:
    """Write the tensors of one shard in the order of `specs`; a context manager.

    Raises:
        CheckpointError: the disk refused, or tensors came in another order or form than announced.
    """

    def __init__(self, file: Path, specs: Mapping[str, TensorSpec]) -> None:
        self.file = file
        self._waiting = list(specs.items())
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, spec in specs.items():
            header[name] = {
                "dtype": _NAMES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [offset, offset + spec.nbytes],
            }
            offset += spec.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._stream: BinaryIO = self._guard(lambda: file.open("xb"))
        self._guard(lambda: self._stream.write(struct.pack("<Q", len(text)) + text))

    def write(self, name: str, tensor: Tensor) -> None:
        """Append the next tensor, which must be the one `specs` has in this place."""
        expected, spec = self._waiting.pop(0)
        if (name, tensor.dtype, tuple(tensor.shape)) != (expected, spec.dtype, spec.shape):
            raise CheckpointError(f"{self.file}: expected {expected} {spec}, got {name} {tensor.dtype} {tensor.shape}")
        if tensor.numel():
            values = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
            self._guard(lambda: self._stream.write(values.numpy().data))

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                if self._waiting:
                    raise CheckpointError(f"{self.file}: {len(self._waiting)} announced tensors were not written")
                self._guard(self._stream.flush)
                self._guard(lambda: os.fsync(self._stream.fileno()))
        finally:
            self._stream.close()

    def _guard(self, action: Callable[[], Result]) -> Result:
        try:
            return action()
        except OSError as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{self.file}: cannot be written: {error.strerror or error}") from error


def write_index(file: Path, specs: Mapping[str, TensorSpec], shard_of: Mapping[str, str]) -> None:
    """Write the index.json that maps every tensor to its shard."""
    index = {
        "metadata": {"total_size": sum(spec.nbytes for spec in specs.values())},
        "weight_map": dict(sorted(shard_of.items())),
    }
    file.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
