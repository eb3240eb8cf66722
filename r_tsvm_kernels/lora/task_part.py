"""The parts of one task, read as an adapter of the base."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint import Checkpoint, FileState, TensorHeader, checksum
from ..checkpoint.reader import require_unchanged
from ..errors import CheckpointError
from ..linalg import Factored
from ..ops._checks import accumulation_dtype, check_finite
from ..parts_folder import LEFT, PARTS_FILE, RIGHT, PartsFolder
from ..text import some
from .adapter import Adapter
from .adapter_config import AdapterConfig
from .changes import Change


@dataclass(frozen=True)
class Added:
    """A difference that is added to a weight."""

    values: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The difference."""
        return (self.values,)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Added:
        """Return it on a device."""
        return Added(self.values.to(device, non_blocking=non_blocking))

    def applied(self, base: Tensor) -> Tensor:
        """Return the sum."""
        dtype = accumulation_dtype(base, self.values)
        return base.to(dtype) + self.values.to(dtype)


class TaskPart(Adapter):
    """The parts of one task of a folder of parts.

    Args:
        path: the file of the task, ``PARTS/TASK.safetensors``.
        folder: the opened folder; None opens it.
        rank: largest rank of factors that are read; None reads all of them.

    Attributes:
        kinds: ``factors`` or ``dense`` for each tensor that has a part.

    Raises:
        CheckpointError: the file is missing or damaged, or does not match ``parts.json``.
    """

    def __init__(self, path: Path, folder: PartsFolder | None = None, rank: int | None = None) -> None:
        self.path, self.rank = path, rank
        self.folder = PartsFolder.open(path.parent) if folder is None else folder
        self.index = self.folder.index_of(path.stem)
        self.config = AdapterConfig(peft_type="LORA")
        self._file = Checkpoint(path, as_stored=True)
        self.modules, self.base_layers = {}, []
        self.kinds = {name: own.kind for name, own in self.folder.tensors.items() if own.kind != "base"}
        for name, kind in self.kinds.items():
            shape = self.folder.tensors[name].shape
            stored = [self._file.tensors.get(own) for own in self._names(name)]
            shapes = [header.shape for header in stored if header is not None]
            product = (*shapes[0][:1], *shapes[-1][1:]) if kind == "factors" and len(shapes) == 2 else shapes[:1]
            fits = len(shapes) == len(stored) and shape in (product, *product)
            if not fits or (kind == "factors" and (len(shape) != 2 or shapes[0][1:] != shapes[1][:1])):
                raise CheckpointError(f"{path}: {name} is missing or not as {PARTS_FILE} says; decompose again")
        expected = {own for name in self.kinds for own in self._names(name)}
        if foreign := [own for own in self._file.tensors if own not in expected]:
            raise CheckpointError(f"{path}: has {some(foreign)}, which {PARTS_FILE} does not have; decompose again")

    def part(
        self, name: str, *, rows: tuple[int, int] | None = None, pin: bool = False, check: bool = True
    ) -> Tensor | Factored:
        """Read the part of a tensor, or of some rows of a dense one.

        Args:
            name: of the tensor.
            rows: first and last (exclusive); None means all.
            pin: read into pinned memory.
            check: compare the checksum; if only some rows are read, or without it, `check_sums` has to follow.

        Raises:
            InputChangedError, CheckpointError: the file cannot be read, has changed, or is of another decomposition.
            NonFiniteError: it holds NaN or infinity.
        """
        values = [self._file.load(own, rows=rows, pin=pin) for own in self._names(name)]
        if check and rows is None:
            self.check_sums(name, [checksum(own) for own in values])
        for own in values:
            check_finite(own, f"{self.path}: {name}")
        if self.kinds[name] == "dense":
            return values[0]
        return Factored(values[0][:, : self.rank].contiguous(), values[1][: self.rank])

    def check_sums(self, name: str, sums: Sequence[str]) -> None:
        """Compare checksums of what is stored for a tensor with those in ``parts.json``.

        Raises:
            CheckpointError: they differ.
        """
        if tuple(sums) != self.folder.tensors[name].checksums[self.index]:
            raise CheckpointError(
                f"{self.path}: {name} is not what {PARTS_FILE} beside it was written for: damaged, or of another "
                "decomposition; decompose again (`rtsvm verify` lists what has changed)"
            )

    def load_change(self, key: str, *, pin: bool = False) -> Factored | Change:
        """Read the part of a tensor as the change of a weight."""
        found = self.part(key, pin=pin)
        return found if isinstance(found, Factored) else Added(found)

    def weight_shapes(self) -> Iterator[tuple[str, tuple[int, ...], str]]:
        """Yield name and shape of every tensor that has a part, and its name again as the key."""
        for name in self.kinds:
            yield name, self.folder.tensors[name].shape, name

    def is_product(self, key: str) -> bool:
        """Whether a part is stored as factors."""
        return self.kinds[key] == "factors"

    def headers(self, key: str) -> tuple[TensorHeader, ...]:
        """Return the headers of what is stored for a tensor."""
        return tuple(self._file.tensors[name] for name in self._names(key))

    def files(self) -> tuple[FileState, ...]:
        """Return the files, with their state at opening."""
        return (self.folder.state, *self._file.files())

    def check_unchanged(self) -> None:
        """Compare size and times of both files with their state at opening.

        Raises:
            InputChangedError: a file has changed or is missing.
        """
        require_unchanged(self.folder.state.path, self.folder.state)
        self._file.check_unchanged()

    def _names(self, module: str) -> tuple[str, ...]:  # type: ignore[override]
        return (module,) if self.kinds[module] == "dense" else (module + LEFT, module + RIGHT)


def is_task_part(path: Path) -> bool:
    """Whether a path is the file of a task in a folder of parts."""
    return path.suffix == ".safetensors" and path.is_file() and (path.parent / PARTS_FILE).is_file()
