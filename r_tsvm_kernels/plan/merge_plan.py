"""The plan of a merge: what happens to each tensor, from which inputs, and where it will be written."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from ..checkpoint import Checkpoint, Copy, TensorHeader, TensorSpec
from ..config import MergeConfig
from ..lora import Adapter
from ..lora.adapted_model import AdaptedModel
from ..merge import Treatment
from ..methods import MethodParameters
from .inputs import sources


@dataclass(frozen=True)
class Part:
    """What is read of one input for a tensor: the tensor itself, or the two factors of its update.

    Attributes:
        source: index of the input in `MergePlan.inputs`.
        dtype: of the values.
        rank: inner dimension of the factors; None for a tensor.
        factor_bytes: size of the factors; 0 for a tensor.
    """

    source: int
    dtype: torch.dtype
    rank: int | None = None
    factor_bytes: int = 0

    def nbytes(self, elements: int) -> int:
        """Return the size of what is read for so many elements of the tensor."""
        return self.dtype.itemsize * elements if self.rank is None else self.factor_bytes


@dataclass(frozen=True)
class TensorPlan:
    """One tensor of the output.

    Attributes:
        name: of the tensor.
        treatment: what happens to it, and why.
        spec: dtype and shape of the output.
        position: of its layer in [0, 1].
        parts: of the inputs that are read, the base's first; of the base alone if its value stays.
        bytes_read: size of these parts.
        options: parameters of the method for this tensor.
        seeded_by: the tensor that it is tied to, with which it shares random masks.
    """

    name: str
    treatment: Treatment
    spec: TensorSpec
    position: float
    parts: tuple[Part, ...]
    options: MethodParameters
    seeded_by: str | None = None

    @property
    def rows(self) -> int:
        """Size of the leading dimension, 1 for a scalar."""
        return self.spec.shape[0] if self.spec.shape else 1

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.spec.shape)

    @property
    def bytes_read(self) -> int:
        """Size of the inputs."""
        return sum(part.nbytes(self.elements) for part in self.parts)

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Of the inputs that are read, in the order of `parts`."""
        return tuple(part.dtype for part in self.parts)

    @property
    def factor_ranks(self) -> tuple[int, ...]:
        """Inner dimensions of the updates that adapters have for the tensor."""
        return tuple(part.rank for part in self.parts if part.rank is not None)


@dataclass(frozen=True)
class InputFile:
    """A file that a merge reads.

    Attributes:
        path: of the file.
        bytes_read: size of the tensors that are read from it.
        passes: 1 if they are read front to back in one go, as those of the base are. More where a model is split or
            sorted in another way than the base, which sets the order.
    """

    path: Path
    bytes_read: int
    passes: int


@dataclass(frozen=True)
class MergePlan:
    """Everything that is decided before the first value is read.

    Attributes:
        base: the checkpoint that lends its layout, buffers and configuration files.
        tuned: the models that are merged: checkpoints, or checkpoints that an adapter changes.
        config: with one entry in `models` per model in `tuned`.
        tensors: by name, in the order they are processed.
        shards: file name, with the folder of its module, to tensor names; in writing order.
        copies: tensors that are not written or read, because they are tied to others; they are compared when the
            merge begins.
    """

    base: Checkpoint
    tuned: tuple[Checkpoint | AdaptedModel, ...]
    config: MergeConfig
    tensors: dict[str, TensorPlan]
    shards: dict[str, list[str]]
    copies: tuple[Copy, ...]

    @cached_property
    def inputs(self) -> tuple[Checkpoint | Adapter, ...]:
        """What is read, the base first, each once even where the base is one of the models."""
        return sources(self.base, self.tuned)

    def row_wise(self, name: str) -> bool:
        """Whether rows of a tensor may be merged apart, without changing a bit of the result.

        Not those of a product of factors, which a matrix library may round otherwise.
        """
        tensor = self.tensors[name]
        return not tensor.factor_ranks and (self.config.method.row_wise or tensor.treatment.kind != "merge")

    def keeps_factors(self, name: str) -> bool:
        """Whether a tensor is merged from the factors of its updates alone, so that no task matrix is formed."""
        tensor = self.tensors[name]
        return (
            bool(tensor.factor_ranks)
            and tensor.treatment.kind == "merge"
            and self.config.method.factored(tensor.options)
            and all((model.base if isinstance(model, AdaptedModel) else model) is self.base for model in self.tuned)
        )

    def update_ranks(self, name: str) -> list[int]:
        """Return the inner dimension of the update that each model with an adapter has for a tensor, 0 for none."""
        ranks = {self.inputs[part.source]: part.rank or 0 for part in self.tensors[name].parts}
        return [ranks.get(model.adapter, 0) for model in self.tuned if isinstance(model, AdaptedModel)]

    def groups(self) -> list[list[str]]:
        """Return the names of tensors that take the same work: treatment, shape, dtypes and ranks are equal."""
        found: dict[object, list[str]] = {}
        for name, tensor in self.tensors.items():
            key = (tensor.treatment.kind, tensor.spec.shape, tensor.spec.dtype, tensor.dtypes, tensor.factor_ranks)
            found.setdefault(key, []).append(name)
        return list(found.values())

    def input_files(self) -> list[InputFile]:
        """Return every input file, and in how many passes the order of work reads it."""
        passes: Counter[Path] = Counter()
        size: Counter[Path] = Counter()
        last: dict[int, TensorHeader] = {}
        for name, tensor in self.tensors.items():
            for part in tensor.parts:
                for header in self._headers(part, name):
                    before = last.get(part.source)
                    passes[header.file] += before is None or header.file != before.file or header.offset < before.offset
                    size[header.file] += header.nbytes
                    last[part.source] = header
        return [InputFile(file, size[file], passes[file]) for file in passes]

    def _headers(self, part: Part, name: str) -> tuple[TensorHeader, ...]:
        """Return the headers of what is read of one input for a tensor."""
        source = self.inputs[part.source]
        if isinstance(source, Checkpoint):
            return (source.tensors[name],)
        return source.headers(self.module(source, name))

    def module(self, adapter: Adapter, name: str) -> str:
        """Return the module of an adapter that changes a tensor."""
        model = next(model for model in self.tuned if isinstance(model, AdaptedModel) and model.adapter is adapter)
        return model.modules[name]

    def accumulation(self, tensor: TensorPlan) -> torch.dtype:
        """Return the dtype that a tensor is merged in."""
        if self.config.dtype is not None:
            return torch.float64 if self.config.dtype == "float64" else torch.float32
        return torch.float64 if torch.float64 in tensor.dtypes else torch.float32

    @property
    def bytes_written(self) -> int:
        """Size of the merged tensors in bytes."""
        return sum(plan.spec.nbytes for plan in self.tensors.values())

    @property
    def bytes_read(self) -> int:
        """Bytes of tensor values read from all inputs."""
        return sum(plan.bytes_read for plan in self.tensors.values())
