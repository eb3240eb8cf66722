"""Write safetensors shards one tensor at a time.

Shapes and dtypes are known in advance: the header is written first and each tensor once, to its place in the file, in
any order. No shard is held in memory.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from ..errors import CheckpointError, DiskFullError
from ..files import write_json
from ..system import SHARED_BLOCK, begin_to_write_back, copy_at, open_descriptor, read_at, reserve, sync, write_at
from .checksums import Checksum, byte_view
from .headers import DTYPES

_PIECE = 8 << 20
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """Dtype and shape of a tensor to be written."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of the values in bytes."""
        return self.dtype.itemsize * math.prod(self.shape)


def plan_shards(specs: Mapping[str, TensorSpec], shard_bytes: int) -> list[list[str]]:
    """Distribute tensors over shards, in order. A shard exceeds `shard_bytes` only if one tensor alone does.

    Within a shard wide dtypes come first, which keeps every tensor aligned to its element size.

    Returns:
        The names of the tensors of each shard.
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


class ShardLayout:
    """The layout of a shard that is to be written.

    Args:
        file_name: name of the shard, with its folder if it has one.
        specs: the tensors, in the order of the file.
        prefix: prefix of the names in `specs` that the names in the file lack.
        metadata: texts by name for the header, beside ``format``.
        begin: a multiple of 8. The header is padded until the offset of the first tensor differs from it by a multiple
            of `SHARED_BLOCK`.

    Attributes:
        file_name: name of the shard.
        specs: the tensors, in the order of the file.
        stored_names: names of the tensors in the file, by their names in `specs`.
        header: the bytes before the first tensor.
        offsets: offset of the first byte of each tensor in the file.
        size: size of the file in bytes.
    """

    def __init__(
        self,
        file_name: str,
        specs: Mapping[str, TensorSpec],
        prefix: str = "",
        metadata: Mapping[str, str] = MappingProxyType({}),
        begin: int | None = None,
    ) -> None:
        self.file_name = file_name
        self.specs = dict(specs)
        self.stored_names = {name: name.removeprefix(prefix) for name in specs}
        entries: dict[str, object] = {"__metadata__": {**metadata, "format": "pt"}}
        begins: dict[str, int] = {}
        end = 0
        for name, spec in self.specs.items():
            begins[name], end = end, end + spec.nbytes
            offsets = [begins[name], end]
            entries[self.stored_names[name]] = {
                "dtype": _NAMES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": offsets,
            }
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        if begin is not None:
            text += b" " * ((begin - 8 - len(text)) % SHARED_BLOCK)
        self.header = struct.pack("<Q", len(text)) + text
        self.offsets = {name: len(self.header) + begin for name, begin in begins.items()}
        self.size = len(self.header) + end


class ShardFile:
    """A shard on disk, at its full size from the start. Tensors are written in any order, by any thread.

    Made by `create` or `open`; a context manager that closes the file.
    """

    def __init__(self, path: Path, layout: ShardLayout, file: int) -> None:
        self.path = path
        self.layout = layout
        self._file = file

    @classmethod
    def create(cls, path: Path, layout: ShardLayout) -> ShardFile:
        """Create a file, reserve its size, and write the header.

        Raises:
            DiskFullError: there is no space for the file; no file is left.
            CheckpointError: the file exists, or cannot be written.
        """
        with _reported(path):
            file = open_descriptor(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        try:
            with _reported(path, layout.size):
                reserve(file, layout.size)
                _write_fully(file, memoryview(layout.header), 0)
        except BaseException:
            os.close(file)
            path.unlink()
            raise
        return cls(path, layout, file)

    @classmethod
    def open(cls, path: Path, layout: ShardLayout) -> ShardFile:
        """Open a file that `create` made, to continue writing.

        Raises:
            CheckpointError: the file is missing, or its header or size does not match the layout.
        """
        with _reported(path):
            file = open_descriptor(path, os.O_RDWR)
        shard = cls(path, layout, file)
        try:
            with _reported(path):
                fits = os.fstat(file).st_size == layout.size
                fits = fits and _read(file, len(layout.header), 0) == layout.header
            if not fits:
                raise CheckpointError(f"{path}: not the shard that was started here; start the merge over")
        except BaseException:
            shard.close()
            raise
        return shard

    def write(self, name: str, tensor: Tensor, first_row: int | None = None) -> None:
        """Write a whole tensor, or its rows from `first_row` on.

        Raises:
            DiskFullError: the disk is full, although the space was reserved.
            CheckpointError: the tensor does not match the layout, or writing failed.
        """
        spec = self.layout.specs.get(name)
        if spec is None or not _fits(spec, tensor, first_row):
            rows = "" if first_row is None else f" from row {first_row}"
            raise CheckpointError(
                f"{self.path}: expected {name} as {spec}, got {tensor.dtype} {tuple(tensor.shape)}{rows}"
            )
        offset = self.layout.offsets[name]
        if first_row:
            offset += first_row * (spec.nbytes // spec.shape[0])
        with _reported(self.path, tensor.nbytes):
            _write_fully(self._file, byte_view(tensor), offset)
        begin_to_write_back(self._file, offset, tensor.nbytes)  # while the next tensors are merged

    def copy(self, name: str, source: int, offset: int, count: int, first_row: int | None = None) -> bool:
        """Copy the bytes of a tensor, or of its rows from `first_row` on, from another open file.

        Returns:
            Whether they are copied; the system may be unable to.

        Raises:
            DiskFullError, CheckpointError: as `write`.
        """
        spec, place = self.layout.specs[name], self.layout.offsets[name]
        place += (first_row or 0) * (spec.nbytes // max(1, spec.shape[0] if spec.shape else 1))
        if place + count > self.layout.offsets[name] + spec.nbytes:
            raise CheckpointError(f"{self.path}: {count} bytes are too many for {name}")
        with _reported(self.path, count):
            return copy_at(source, offset, self._file, place, count)

    def read_checksum(self, name: str) -> str:
        """Return the checksum of the bytes on disk of a tensor.

        Raises:
            CheckpointError: it cannot be read.
        """
        state = Checksum()
        offset, left = self.layout.offsets[name], self.layout.specs[name].nbytes
        with _reported(self.path):
            while left:
                piece = _read(self._file, min(left, _PIECE), offset)
                if not piece:
                    raise CheckpointError(f"{self.path}: the file has become shorter")
                state.update(piece)
                offset, left = offset + len(piece), left - len(piece)
        return state.hexdigest()

    def sync(self) -> None:
        """Sync everything written so far to disk.

        Raises:
            DiskFullError, CheckpointError: writing failed.
        """
        with _reported(self.path):
            sync(self._file)

    def close(self) -> None:
        """Close the file, unless it is closed."""
        if self._file >= 0:
            file, self._file = self._file, -1
            os.close(file)

    def __enter__(self) -> ShardFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def write_index(file: Path, specs: Mapping[str, TensorSpec], shard_of: Mapping[str, str]) -> None:
    """Write the index.json that maps every tensor to its shard."""
    index = {
        "metadata": {"total_size": sum(spec.nbytes for spec in specs.values())},
        "weight_map": dict(sorted(shard_of.items())),
    }
    write_json(file, index)


def _fits(spec: TensorSpec, tensor: Tensor, first_row: int | None) -> bool:
    """Whether a tensor matches `spec`, or its rows from `first_row` on."""
    shape = tuple(tensor.shape)
    if first_row is None:
        return (tensor.dtype, shape) == (spec.dtype, spec.shape)
    if tensor.dtype != spec.dtype or not shape or shape[1:] != spec.shape[1:]:
        return False
    return len(shape) == len(spec.shape) and 0 <= first_row <= spec.shape[0] - shape[0]


def _read(file: int, size: int, offset: int) -> memoryview:
    """Return at most `size` bytes, none at the end of the file."""
    buffer = memoryview(bytearray(size))
    return buffer[: read_at(file, buffer, offset)]


def _write_fully(file: int, buffer: memoryview, offset: int) -> None:
    """Write the whole buffer; one call may write less."""
    done = 0
    while done < len(buffer):
        done += write_at(file, buffer[done:], offset + done)


@contextmanager
def _reported(path: Path, needed: int = 0) -> Iterator[None]:
    """Turn an OSError of the ``with`` block into an error that names the file."""
    try:
        yield
    except OSError as error:
        if isinstance(error, CheckpointError):
            raise
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(path.parent).free
            full = f"{needed:,} bytes are needed and {free:,} are free"
            if free >= needed:  # of the bytes; a file also needs an inode, and a quota may be smaller
                full = f"it has no room for another file, or a quota is used up ({free:,} bytes are free)"
            raise DiskFullError(
                f"{path}: the disk is full: {full}; make room, or choose an output on another disk"
            ) from error
        raise CheckpointError(f"{path}: cannot be written or read back: {error.strerror or error}") from error
