"""Pickled checkpoints, read only when the user allows it, and then only tensors: `torch.load(weights_only=True)`."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor

from ..errors import CheckpointError, PickleRefusedError
from ..files import open_regular
from ..text import printable
from .headers import DTYPES, FileState, TensorHeader, check_name, file_state

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class PickleFile:
    """A file that `torch.save` made from a dict of tensors. Its values stay on disk until they are copied.

    They are mapped into memory, so copied parts count as memory of the process until the system reclaims them.

    Attributes:
        file: the opened file.
        headers: headers of the tensors, in the order of the file.
        state: of the file when it was opened.

    Raises:
        CheckpointError: damaged, or not a dict of tensors.
        PickleRefusedError: it holds more than tensors, which only running its code could restore.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._tensors, stat = _load(file)
        first = min((tensor.data_ptr() for tensor in self._tensors.values() if tensor.numel()), default=0)
        headers = {}
        for name, tensor in self._tensors.items():
            offset = tensor.data_ptr() - first if tensor.numel() else 0
            if tensor.nbytes > stat.st_size:
                # Strides of zero make a small file look huge.
                raise CheckpointError(f"{file}: {name} would take {tensor.nbytes} bytes, the file has {stat.st_size}")
            headers[name] = TensorHeader(file, tensor.dtype, tuple(tensor.shape), offset, tensor.nbytes)
        self.headers = dict(sorted(headers.items(), key=lambda item: item[1].offset))
        described = [(name, h.dtype, h.shape, h.offset) for name, h in self.headers.items()]
        self.state: FileState = file_state(file, stat, repr(described).encode())

    def copy(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """Return a tensor, or some rows of it, in memory of its own."""
        tensor = self._tensors[name] if rows is None else self._tensors[name][slice(*rows)]
        return tensor.clone(memory_format=torch.contiguous_format)

    def __reduce__(self) -> tuple[type[PickleFile], tuple[Path]]:
        """Pickle the path alone: another process opens the file itself."""
        return PickleFile, (self.file,)


def _load(file: Path) -> tuple[dict[str, Tensor], os.stat_result]:
    try:
        with open_regular(file) as opened, zipfile.ZipFile(opened) as archive:
            stat = os.fstat(opened.fileno())
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("it is compressed, which torch.save never does")
        data = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except zipfile.BadZipFile as error:
        raise CheckpointError(
            f"{file}: truncated, or not a file of torch.save since version 1.6; load it and save it again"
        ) from error
    except UnpicklingError as error:
        # Without torch's message, which recommends switching the protection off.
        raise PickleRefusedError(
            f"{file}: damaged, or it holds more than tensors, whose code is not run; save its state_dict alone"
        ) from error
    # The exception that a damaged pickle raises depends on which byte is wrong.
    except Exception as error:
        reason = printable(" ".join(f"{type(error).__name__}: {error}".split()))
        raise CheckpointError(f"{file}: not a readable pickle of tensors ({reason})") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{file}: expected a dict from names to tensors, got {type(data).__name__}")
    return {name: _checked(file, name, value) for name, value in data.items()}, stat


def _checked(file: Path, name: object, value: object) -> Tensor:
    if not isinstance(name, str) or not isinstance(value, Tensor):
        raise CheckpointError(
            f"{file}: expected a dict from names to tensors, got {ascii(name)[:40]}: {type(value).__name__}; "
            "save the state_dict alone"
        )
    try:
        check_name(name)
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from error
    if value.layout != torch.strided or value.device.type != "cpu" or value.dtype not in DTYPES.values():
        raise CheckpointError(f"{file}: {name} is {value.dtype}, {value.layout}, on {value.device}; cannot be merged")
    return value.detach()
