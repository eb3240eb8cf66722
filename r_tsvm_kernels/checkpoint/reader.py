"""Read checkpoints: files and headers of all tensors, and the values of one tensor at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..errors import CheckpointError, InputChangedError
from ..files import open_regular, usable_path
from ..quantised import refuse_quantised
from ..system import read_at, reads_in_order
from ..text import some
from .checksums import Checksum, byte_view
from .headers import FileState, TensorHeader, read_headers, read_json, read_metadata
from .modules import Module, find_modules
from .pickles import PICKLE_SUFFIXES, PickleFile
from .prefixes import same_but_for_prefix
from .scaled import ScaledHeader, find_scaled, load_packed, load_scaled, load_scales, without_quantisation

# Rows are read in pieces of about this size where they are not wanted together.
_PIECE_BYTES = 1 << 20
# Tensors from this size on are read into huge pages: reading into fresh memory took half to three quarters of the time.
# Smaller ones take memory that was in use before.
_HUGE_BYTES = 4 << 20


class Checkpoint:
    """A Hugging Face folder or a single file, opened for reading. Only headers are read before `load`.

    Args:
        path: a folder, or a .safetensors file.
        allow_pickle: read pickled weights if there are no others; only tensors are unpickled.
        as_stored: show every tensor as it is stored, quantised or not, instead of values.

    Attributes:
        path: the path that was given.
        folder: folder of the model; None for a single file.
        folders: folders of its modules, relative to `folder` and with slashes; the first, an empty name, is `folder`.
        modules: the modules with weights.
        main: folder of configuration and tokenizer: that of the main module; None for a single file.
        stem: stem of the weight files, e.g. ``model``.
        tensors: header of every tensor, in the order of the files and of the bytes in them. Names of modules other than
            the main one begin with their folder: ``2_Dense/linear.weight``. Weights with scales (FP8, MXFP4) have the
            dtype and shape of the values they stand for, and their scales are left out: see `scaled`.
        config: parsed ``config.json``; empty if there is none.
        notes: what of the files was ignored, and why.
        activation_scales: headers of the scales of activations and caches that belong to weights with scales; they are
            not among the tensors.

    Raises:
        CheckpointError: a file is missing, damaged or hostile; the message names the file.
        QuantisedRefusedError: the weights are quantised.
        PickleRefusedError: there are only pickled weights, and pickle is not allowed or holds code.
    """

    def __init__(self, path: str | Path, *, allow_pickle: bool = False, as_stored: bool = False) -> None:
        self.path = usable_path(path)
        self.folder = self.path if self.path.is_dir() else None
        self._states: dict[Path, FileState] = {}
        self._pickles: dict[Path, PickleFile] = {}
        self._modules: dict[Path, Module] = {}
        self._stored: dict[str, str] = {}
        found = find_modules(self.path, allow_pickle)
        self._states.update((state.path, state) for state in found.states)
        self.folders, self.modules = found.folders, found.modules
        self.main = self.folder and self.folder / found.main
        self.stem = self.modules[0].weights.stem
        self.tensors: dict[str, TensorHeader] = {}
        self.notes: list[str] = []
        self.activation_scales: dict[str, TensorHeader] = {}
        for module in self.modules:
            self._read_module(module)
        if not self.tensors:
            raise CheckpointError(f"{self.path}: the checkpoint holds no tensors")
        self.config: dict[str, Any] = {}
        for module in self.modules:
            config, beside = self._read_config(module)
            own = {name: header for name, header in self.tensors.items() if self.module(name) is module}
            own = own if as_stored else self._with_values(own, config)
            readable = (
                without_quantisation(config) if any(isinstance(x, ScaledHeader) for x in own.values()) else config
            )
            if not as_stored:
                refuse_quantised(self.path / module.folder, own, readable, beside)
            if not module.prefix:
                self.config = config

    def load(
        self,
        name: str,
        device: str | torch.device = "cpu",
        *,
        rows: tuple[int, int] | None = None,
        pin: bool = False,
    ) -> Tensor:
        """Read one tensor into new memory. Several threads may load at the same time.

        Args:
            name: name of the tensor.
            device: device of the result.
            rows: first and last (exclusive) row of the leading dimension; None reads all rows.
            pin: read into page-locked memory, which a GPU copies faster; needs CUDA.

        Returns:
            The tensor, or its rows, in the stored dtype.

        Raises:
            InputChangedError: the file has changed since the checkpoint was opened.
            CheckpointError: the file cannot be read.
        """
        header = self.tensors[name]
        shape = header.shape
        first, last = rows or (0, shape[0] if shape else 1)
        if isinstance(header, ScaledHeader):
            return load_scaled(header, (first, last), self._read_rows, pin).to(device)
        if rows and not (shape and 0 <= first <= last <= shape[0]):
            raise CheckpointError(f"{header.file}: {name} has shape {shape}, rows {first} to {last} were asked for")
        if header.file in self._pickles:
            tensor = self._copy_pickled(header, name, rows)
            return (tensor.pin_memory() if pin else tensor).to(device)
        offset = header.offset + first * (header.nbytes // shape[0]) if first else header.offset
        size = (last - first, *shape[1:]) if rows else shape
        tensor = torch.empty(size, dtype=header.dtype, device="cpu", pin_memory=pin)
        if not pin and tensor.nbytes >= _HUGE_BYTES and backends.state("cpu") == backends.READY:
            backends.native("cpu").prefer_huge_pages(tensor.data_ptr(), tensor.nbytes)
        self._fill(tensor, header, offset, name)
        return tensor.to(device)

    def _read_rows(self, header: TensorHeader, first: int, last: int, columns: int) -> Tensor:
        """Return rows of a stored tensor, taken as a matrix."""
        tensor = torch.empty(last - first, columns, dtype=header.dtype, device="cpu")
        self._fill(tensor, header, header.offset + first * columns * header.dtype.itemsize, "a weight")
        return tensor

    def _fill(self, tensor: Tensor, header: TensorHeader, offset: int, name: str) -> None:
        """Read the bytes of a tensor from the file of `header`."""
        with self._opened(header, name) as file:
            _read_fully(file, byte_view(tensor), offset)

    def show_activation_scales(self) -> None:
        """From now on, count the scales of activations as tensors."""
        self.tensors |= self.activation_scales

    def load_fp8(self, name: str, rows: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Read rows of a weight in FP8 and their scales, as they are stored."""
        header = self.tensors[name]
        assert isinstance(header, ScaledHeader)
        return load_packed(header, rows, self._read_rows), self.load_scales(name, rows)

    def load_scales(self, name: str, rows: tuple[int, int]) -> Tensor:
        """Read the stored scales of rows of a weight."""
        header = self.tensors[name]
        assert isinstance(header, ScaledHeader)
        return load_scales(header, rows, self._read_rows)

    @property
    def is_scaled(self) -> bool:
        """Whether some weights are stored with scales."""
        return any(isinstance(header, ScaledHeader) for header in self.tensors.values())

    def load_rows(self, name: str, rows: Tensor, out: Tensor) -> None:
        """Read single rows of a tensor into another tensor.

        Args:
            name: name of the tensor.
            rows: int64 (n,), for each row of `out` the row of the tensor; -1 leaves the row of `out` as it is.
            out: n rows on the CPU, contiguous, of any dtype.

        Raises:
            InputChangedError, CheckpointError: as `load`.
        """
        header = self.tensors[name]
        size = header.nbytes // max(1, header.shape[0])
        if header.file in self._pickles or isinstance(header, ScaledHeader):
            for place, first, last in runs(rows, most=max(1, _PIECE_BYTES // max(1, size))):
                out[place : place + last - first] = self.load(name, rows=(first, last))
            return
        same = out.dtype == header.dtype
        target = byte_view(out)
        with self._opened(header, name) as file:
            for place, first, last in runs(rows, most=max(1, _PIECE_BYTES // max(1, size))):
                offset, count = header.offset + first * size, last - first
                if same:  # a view of bytes for each row takes a fraction of the time of a tensor
                    _read_fully(file, target[place * size : (place + count) * size], offset)
                else:
                    values = torch.empty(count, *out.shape[1:], dtype=header.dtype, device="cpu")
                    _read_fully(file, byte_view(values), offset)
                    out[place : place + count] = values

    def place(self, name: str) -> int | None:
        """Return the offset in its file of a tensor that `copy_rows` can copy; None if it cannot."""
        header = self.tensors[name]
        return None if isinstance(header, ScaledHeader) or header.file in self._pickles else header.offset

    def copy_rows(self, name: str, rows: tuple[int, int] | None, copy: Callable[[int, int, int], bool]) -> bool:
        """Copy a tensor, or rows of it, as it is stored.

        Args:
            name: name of the tensor.
            rows: first and last (exclusive) row; None means the whole tensor.
            copy: takes the descriptor of the file, the place of the first byte, and the number of bytes; returns
                whether they are copied.

        Returns:
            What `copy` returned; False for tensors that are pickled or stored with scales.

        Raises:
            InputChangedError: the file has changed since the checkpoint was opened.
            CheckpointError: the file cannot be read.
        """
        header, place = self.tensors[name], self.place(name)
        if place is None:
            return False
        first, last = rows or (0, header.shape[0] if header.shape else 1)
        size = header.nbytes // max(1, header.shape[0] if header.shape else 1)
        try:
            stream = open_regular(header.file)
        except OSError as error:
            raise CheckpointError(f"{header.file}: cannot read {name}: {error.strerror or error}") from error
        with stream:
            done = copy(stream.fileno(), place + first * size, (last - first) * size)
        require_unchanged(header.file, self._states[header.file])
        return done

    def checksum(self, name: str) -> str:
        """Return the checksum of a tensor on disk, read some rows at a time.

        Raises:
            InputChangedError, CheckpointError: as `load`.
        """
        header = self.tensors[name]
        state = Checksum()
        step = max(1, _PIECE_BYTES * header.shape[0] // max(1, header.nbytes)) if header.shape else 1
        if not header.shape or step >= header.shape[0]:
            state.update(self.load(name))
            return state.hexdigest()
        for first in range(0, header.shape[0], step):
            state.update(self.load(name, rows=(first, min(first + step, header.shape[0]))))
        return state.hexdigest()

    def files(self) -> tuple[FileState, ...]:
        """Return every file of this checkpoint, with its state at opening."""
        return tuple(self._states.values())

    def watch(self, state: FileState) -> None:
        """Add a file that was read beside the weights to those of this checkpoint."""
        self._states[state.path] = state

    def check_unchanged(self) -> None:
        """Compare size and times of every file with its state at opening.

        Raises:
            InputChangedError: a file has changed or is missing.
        """
        for file, state in self._states.items():
            require_unchanged(file, state)

    def share(self, name: str, original: str) -> None:
        """From now on, read a tensor that is not stored from the tensor that it is tied to."""
        self.tensors[name] = self.tensors[original]
        self._stored[name] = self._stored.get(original, original)

    def rename(self, names: Mapping[str, str]) -> None:
        """Give tensors other names: the new ones by the stored ones."""
        self.tensors = {names.get(name, name): header for name, header in self.tensors.items()}
        self._stored |= {new: name for name, new in names.items()}

    def take_names(self, base: Checkpoint) -> None:
        """Give tensors whose names differ from the base's in the prefix of a model class the names of the base."""
        names = same_but_for_prefix(self.tensors, base.tensors)
        self.rename(names)
        if names:
            name, new = next(iter(names.items()))
            self.notes.append(f"{self.path}: {len(names)} tensors take the names of the base ({name} is its {new})")

    def view(self, names: Mapping[str, str]) -> Checkpoint:
        """Return this checkpoint with some of its tensors, under other names.

        Args:
            names: the names that the view has, with those here; a tensor may have several names.
        """
        view = copy(self)
        view.tensors = {name: self.tensors[own] for name, own in names.items()}
        view._stored = {name: self._stored.get(own, own) for name, own in names.items()}
        view.activation_scales = {}
        return view

    def module(self, name: str) -> Module:
        """Return the module of a tensor; of one that is not stored, the module that its name belongs to."""
        if name in self.tensors:
            return self._modules[self.tensors[name].file]
        return max((x for x in self.modules if name.startswith(x.prefix)), key=lambda x: len(x.prefix))

    def metadata(self, names: Iterable[str]) -> dict[str, str]:
        """Return what the headers of all files that hold these tensors say in common, such as ``modelspec.title``.

        Hashes of the file's content are left out. Names of tensors that are not stored are ignored.

        Raises:
            CheckpointError: a file cannot be read.
        """
        files = {self.tensors[name].file for name in names if name in self.tensors}
        found = [read_metadata(file).items() for file in files if file not in self._pickles]
        common = set.intersection(*map(set, found)) if found else set()
        return {key: value for key, value in sorted(common) if "hash" not in key}

    def _with_values(self, own: dict[str, TensorHeader], config: dict[str, Any]) -> dict[str, TensorHeader]:
        """Put the values of scaled weights in place of the weights among the tensors of a module, and return these."""
        stored = {name: header for name, header in own.items() if header.file not in self._pickles}
        found = find_scaled(stored, config)
        scales = {header.scale_name for header in found.headers.values()}
        self.activation_scales |= {name: stored[name] for name in sorted(found.hidden - scales)}
        self.tensors = found.visible(self.tensors)
        return found.visible(own)

    @contextmanager
    def _opened(self, header: TensorHeader, name: str) -> Iterator[int]:
        """Yield the descriptor of the file of a tensor; check afterwards that the file is whole and unchanged."""
        # Read, not mapped: mapped pages would count as memory of this process, and a truncated file would end it with
        # SIGBUS instead of an error. The file is opened for each tensor, so that a missing file is noticed.
        try:
            with open_regular(header.file) as stream:
                file = stream.fileno()
                reads_in_order(file)
                yield file
                unchanged = self._states[header.file].same_file(os.fstat(file))
        except EOFError:
            unchanged = False
        except OSError as error:
            raise CheckpointError(f"{header.file}: cannot read {name}: {error.strerror or error}") from error
        if not unchanged:
            raise _changed(header.file, f", noticed while reading {name}")

    def _read_module(self, module: Module) -> None:
        weights = module.weights
        if weights.ignored:
            read = weights.index_state.path.name if weights.index_state else weights.files[0].name
            self.notes.append(f"{self.path / module.folder}: {read} is read, {some(weights.ignored)} ignored")
        unlisted: list[str] = []
        for file in weights.files:
            self._modules[file] = module
            unlisted += self._read_headers(file, module.prefix, weights.index)
        if weights.index is not None and weights.index_state is not None:
            self._check_index(module, weights.index)
            self._states[weights.index_state.path] = weights.index_state
        if unlisted:
            self.notes.append(f"{self.path / module.folder}: {some(unlisted)} ignored: not where the index says")

    def _read_config(self, module: Module) -> tuple[dict[str, Any], list[str]]:
        """Return the configuration of a module, and the names of all JSON files beside its weights."""
        if self.folder is None:
            return {}, []
        folder = self.folder / module.folder
        config: dict[str, Any] = {}
        if (folder / "config.json").exists():
            config, self._states[folder / "config.json"] = read_json(folder / "config.json")
        return config, sorted(file.name for file in folder.glob("*.json"))

    def _read_headers(self, file: Path, prefix: str, index: dict[str, str] | None) -> list[str]:
        """Read the tensors of a file that the index, if there is one, places in it; return the names of the others."""
        if file.suffix in PICKLE_SUFFIXES:
            self._pickles[file] = PickleFile(file)
            headers, self._states[file] = self._pickles[file].headers, self._pickles[file].state
        else:
            headers, self._states[file] = read_headers(file)
        unlisted = []
        for local_name, header in headers.items():
            name = prefix + local_name
            if index is not None and PurePosixPath(index.get(local_name, "")).name != file.name:
                unlisted.append(name)
                continue
            if name in self.tensors:
                raise CheckpointError(f"{self.path}: {name} is both in {self.tensors[name].file.name} and {file.name}")
            self.tensors[name] = header
        return unlisted

    def _copy_pickled(self, header: TensorHeader, name: str, rows: tuple[int, int] | None) -> Tensor:
        state = self._states[header.file]
        # Before and after: the file is mapped, and a truncated file must not be read.
        require_unchanged(header.file, state)
        prefix = self._modules[header.file].prefix
        stored = self._stored.get(name, name).removeprefix(prefix)
        tensor = self._pickles[header.file].copy(stored, rows)
        require_unchanged(header.file, state)
        return tensor

    def _check_index(self, module: Module, index: dict[str, str]) -> None:
        for name, file in ((module.prefix + name, file) for name, file in index.items()):
            header = self.tensors.get(name)
            if header is None or header.file.name != PurePosixPath(file).name:
                raise CheckpointError(f"{self.path}: the index places {name} in {file}, but it is not there")


def runs(rows: Tensor, most: int) -> Iterator[tuple[int, int, int]]:
    """Yield runs of successive rows, without those of -1: the place of the first, the first and last (exclusive) row.

    Examples:
        >>> list(runs(torch.tensor([4, 5, -1, 0, 1, 2]), most=2))
        [(0, 4, 6), (3, 0, 2), (5, 2, 3)]
    """
    found = torch.nonzero(rows >= 0).flatten()
    joined = (rows[found].diff() == 1) & (found.diff() == 1)
    starts = (torch.nonzero(~joined).flatten() + 1).tolist()
    places, wanted = found.tolist(), rows[found].tolist()
    for start, stop in pairwise([0, *starts, len(places)] if places else []):
        for first in range(start, stop, most):
            yield places[first], wanted[first], wanted[first] + min(first + most, stop) - first


def _read_fully(file: int, buffer: memoryview, offset: int) -> None:
    """Fill the buffer from a file; an EOFError if it is too short. One call may read less."""
    done = 0
    while done < len(buffer):
        count = read_at(file, buffer[done:], offset + done)
        if not count:
            raise EOFError
        done += count


def require_unchanged(file: Path, state: FileState) -> None:
    """Raise `InputChangedError` unless size and times of a file match its state."""
    try:
        unchanged = state.same_file(file.stat())
    except OSError:
        unchanged = False
    if not unchanged:
        raise _changed(file, "")


def _changed(file: Path, when: str) -> InputChangedError:
    return InputChangedError(f"{file}: changed since the merge was planned{when}; restore it, or start over")
