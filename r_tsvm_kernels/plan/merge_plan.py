"""The plan of a merge: for each tensor its treatment, its inputs and its place in the output."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch

from ..blocks import WHOLE, Blocks
from ..checkpoint import Checkpoint, Copy, ScaledHeader, TensorHeader, TensorSpec
from ..config import MergeConfig
from ..lora import Adapter
from ..lora.adapted_model import AdaptedModel
from ..methods import MethodParameters
from ..parts import StoredParts
from ..parts_folder import PartsFolder
from ..treatments import Treatment
from .inputs import sources
from .vocabulary import AlignedVocabulary


@dataclass(frozen=True)
class Part:
    """The part of a tensor that one input has: the tensor itself, or the two factors of its update.

    Attributes:
        source: index of the input in `MergePlan.inputs`.
        dtype: dtype of the values.
        rank: inner dimension of the factors; None for a tensor.
        factor_bytes: size of the factors; 0 for a tensor.
        whole: whether an adapter's change is more than a product, so that the tuned tensor has to be formed.
        file_bytes: size in files of a tensor that is stored as a weight with scales; None if that is its size.
    """

    source: int
    dtype: torch.dtype
    rank: int | None = None
    factor_bytes: int = 0
    file_bytes: int | None = None
    whole: bool = False

    def nbytes(self, elements: int) -> int:
        """Return the bytes in memory of this number of elements of the tensor; factors are read whole."""
        return self.dtype.itemsize * elements if self.rank is None else self.factor_bytes


@dataclass(frozen=True)
class TensorPlan:
    """One tensor of the output.

    Attributes:
        name: of the tensor.
        treatment: how it is merged, and why.
        spec: dtype and shape of the output.
        position: of its layer in [0, 1].
        parts: parts of the inputs to read, the base first; only that of the base if its value stays.
        options: parameters of the method for this tensor.
        seeded_by: name of the tensor that it is tied to and shares random masks with; None if it is not tied.
        blocks: how the tensor is divided into matrices.
        fp8: layout in FP8 that the tensor is written in; None if it is written as `spec` alone says.
        aligned: whether its rows are read in the order of `MergePlan.vocabulary`.
        stored_parts: how its parts are stored, if it is decomposed; otherwise None.
    """

    name: str
    treatment: Treatment
    spec: TensorSpec
    position: float
    parts: tuple[Part, ...]
    options: MethodParameters
    seeded_by: str | None = None
    blocks: Blocks = WHOLE
    fp8: ScaledHeader | None = None
    aligned: bool = False
    stored_parts: StoredParts | None = None

    @property
    def merged_dtype(self) -> torch.dtype:
        """The dtype that the merged tensor is rounded to, before it is written in FP8."""
        return self.spec.dtype if self.fp8 is None else torch.float32

    @property
    def outputs(self) -> dict[str, TensorSpec]:
        """What is written: the tensor, with its scales if it is in FP8; or its parts."""
        if self.stored_parts is not None:
            return self.stored_parts.specs(self.name, self.spec.shape)
        found = {self.name: self.spec}
        if self.fp8 is not None:
            found[self.fp8.scale_name] = TensorSpec(self.fp8.scales.dtype, self.fp8.scales.shape)
        return found

    @property
    def merged_apart(self) -> Blocks:
        """The blocks, if the method merges them one by one; otherwise one block."""
        return self.blocks if self.treatment.kind == "merge" else WHOLE

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
        """Bytes to read from all inputs."""
        return sum(part.nbytes(self.elements) if part.file_bytes is None else part.file_bytes for part in self.parts)

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Dtypes of `parts`."""
        return tuple(part.dtype for part in self.parts)

    @property
    def factor_ranks(self) -> tuple[int, ...]:
        """Inner dimensions of the updates of adapters."""
        return tuple(part.rank for part in self.parts if part.rank is not None)


@dataclass(frozen=True)
class InputFile:
    """A file that a merge reads.

    Attributes:
        path: path of the file.
        bytes_read: size of the tensors that are read from it.
        passes: 1 if they are read front to back once, as those of the base are. More if a model is split or sorted
            differently from the base, which sets the order.
    """

    path: Path
    bytes_read: int
    passes: int


@dataclass(frozen=True)
class MergePlan:
    """Everything that is decided before the first value is read.

    Attributes:
        base: the checkpoint whose layout, buffers and sidecar files the output has.
        tuned: the models to merge: checkpoints, or checkpoints that an adapter changes.
        config: the recipe, with one entry in `models` per model in `tuned`.
        tensors: by name, in the order of processing.
        shards: maps file names, with the folder of their module, to tensor names in writing order.
        copies: tensors that are neither read nor written because they are tied to others; compared when the merge
            starts.
        beside: by model, the tensors that it has and the base lacks, if the output has none of them either.
        notes: what deserves attention: files that were ignored, configs that contradict each other, missing tensors.
        vocabulary: of the output, if the recipe asks for one.
        parts: the folder of parts that the merge reads in place of models; otherwise None.
        sections: the plan of each tensor's slice or module, by tensor; empty if models are merged whole. The models of
            such a plan have the tensors of its slice alone, under the names that these have in the output.
        layers: for each layer of the output a model whose configuration describes it, and the layer's index there;
            empty if the layers are those of the base.
    """

    base: Checkpoint
    tuned: tuple[Checkpoint | AdaptedModel, ...]
    config: MergeConfig
    tensors: dict[str, TensorPlan]
    shards: dict[str, list[str]]
    copies: tuple[Copy, ...]
    beside: dict[Path, tuple[str, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    vocabulary: AlignedVocabulary | None = None
    parts: PartsFolder | None = None
    sections: dict[str, MergePlan] = field(default_factory=dict)
    layers: tuple[tuple[Checkpoint, int], ...] = ()

    def section(self, name: str) -> MergePlan:
        """Return the plan whose models a tensor is merged from: that of its slice or module, or this one."""
        return self.sections.get(name, self)

    def copied_from(self, name: str) -> Checkpoint | None:
        """Return the checkpoint whose bytes a tensor is; None if its values are computed or converted."""
        own, tensor = self.section(name), self.tensors[name]
        if tensor.treatment.kind != "base" or self.decomposed or len(tensor.parts) != 1:
            return None
        source = own.inputs[tensor.parts[0].source]
        if not isinstance(source, Checkpoint) or tensor.aligned or tensor.fp8 is not None:
            return None
        header = source.tensors[name]
        return source if (header.dtype, header.shape) == (tensor.spec.dtype, tensor.spec.shape) else None

    @cached_property
    def inputs(self) -> tuple[Checkpoint | Adapter, ...]:
        """Checkpoints and adapters to read, each once, the base first."""
        return sources(self.base, self.tuned)

    @property
    def decomposed(self) -> bool:
        """Whether parts are written instead of merged tensors."""
        return any(tensor.stored_parts is not None for tensor in self.tensors.values())

    @property
    def dequantised(self) -> dict[str, int]:
        """By checkpoint, the number of weights that are stored with scales; without checkpoints that have none."""
        checkpoints = [source for source in self.inputs if isinstance(source, Checkpoint)]
        counts = {
            str(checkpoint.path): sum(isinstance(header, ScaledHeader) for header in checkpoint.tensors.values())
            for checkpoint in checkpoints
        }
        return {path: count for path, count in counts.items() if count}

    def row_wise(self, name: str) -> bool:
        """Whether rows of a tensor, or packed experts, can be merged separately with the same bits.

        Rows of a product of factors cannot: matrix libraries may round them differently.
        """
        tensor, config = self.tensors[name], self.section(name).config
        apart = config.row_wise or tensor.treatment.kind != "merge" or tensor.merged_apart.packed
        apart = apart or self.parts is not None
        return not tensor.factor_ranks and apart

    def keeps_factors(self, name: str) -> bool:
        """Whether a tensor is merged from the factors of its updates, without forming a task matrix."""
        tensor, own = self.tensors[name], self.section(name)
        return (
            bool(tensor.factor_ranks)
            and tensor.treatment.kind == "merge"
            and self.parts is None
            and not any(part.whole for part in tensor.parts)
            and own.config.method.factored(tensor.options)
            and all((model.base if isinstance(model, AdaptedModel) else model) is own.base for model in own.tuned)
        )

    def update_ranks(self, name: str) -> list[int]:
        """Return the inner dimension of each adapter's update of a tensor, 0 for adapters without one."""
        own = self.section(name)
        ranks = {own.inputs[part.source]: part.rank or 0 for part in self.tensors[name].parts}
        return [ranks.get(model.adapter, 0) for model in own.tuned if isinstance(model, AdaptedModel)]

    def groups(self) -> list[list[str]]:
        """Return the names of tensors in groups of equal treatment, shape, dtypes and ranks."""
        found: dict[object, list[str]] = {}
        for name, tensor in self.tensors.items():
            facts = (tensor.spec.shape, tensor.spec.dtype, tensor.dtypes, tensor.factor_ranks, tensor.merged_apart)
            key = (tensor.treatment.kind, *facts)
            found.setdefault(key, []).append(name)
        return list(found.values())

    def input_files(self) -> list[InputFile]:
        """Return every input file, with the number of passes over it."""
        passes: Counter[Path] = Counter()
        size: Counter[Path] = Counter()
        last: dict[Path, TensorHeader] = {}
        for name, tensor in self.tensors.items():
            for part in tensor.parts:
                source = self.section(name).inputs[part.source].path
                headers = self.section(name)._headers(part, name)
                for header in headers:
                    size[header.file] += header.nbytes
                # Scales of weights, which may be anywhere, are too small to count as a pass.
                for header in headers if part.file_bytes is None else headers[:1]:
                    before = last.get(source)
                    passes[header.file] += before is None or header.file != before.file or header.offset < before.offset
                    last[source] = header
        return [InputFile(file, size[file], max(1, passes[file])) for file in size]

    def _headers(self, part: Part, name: str) -> tuple[TensorHeader, ...]:
        """Return the headers of one part of a tensor."""
        source = self.inputs[part.source]
        if isinstance(source, Checkpoint):
            return source.tensors[name].stored
        return source.headers(self.module(source, name))

    def module(self, adapter: Adapter, name: str) -> str:
        """Return the module of an adapter that changes a tensor."""
        model = next(model for model in self.tuned if isinstance(model, AdaptedModel) and model.adapter is adapter)
        return model.modules[name]

    def accumulation(self, tensor: TensorPlan) -> torch.dtype:
        """Return the dtype in which a tensor is merged."""
        if self.config.dtype is not None:
            return torch.float64 if self.config.dtype == "float64" else torch.float32
        return torch.float64 if torch.float64 in tensor.dtypes else torch.float32

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """Dtypes and shapes of all tensors that are written."""
        found: dict[str, TensorSpec] = {}
        for tensor in self.tensors.values():
            found |= tensor.outputs
        return found

    @property
    def bytes_written(self) -> int:
        """Size of the merged tensors in bytes."""
        return sum(spec.nbytes for spec in self.specs.values())

    @property
    def bytes_read(self) -> int:
        """Bytes of tensor values read from all inputs."""
        return sum(plan.bytes_read for plan in self.tensors.values())
