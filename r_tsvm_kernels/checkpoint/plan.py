"""The plan of a merge, from headers alone: what happens to each tensor and where it will be written."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from ..config import MergeConfig
from ..errors import CheckpointError, ConfigError, ShapeError
from ..merge import Treatment, check_same_names, stored_dtype, treatment
from ..methods import Cost, Job, MethodParameters, elementwise_cost
from ..ops import FLOAT_DTYPES
from ..parameters import layer_positions
from .headers import TensorHeader
from .hub import resolve
from .reader import Checkpoint
from .vocabulary import check_same_vocabulary
from .writer import TensorSpec, plan_shards, shard_name

# Scalars, masks of a row, whole pages.
_SMALL = 1 << 16

# The output head of a model whose config ties it to the embedding.
_HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Footprint:
    """Memory of merging one tensor, or some rows of it.

    Attributes:
        inputs: bytes of the inputs as they are stored.
        work: upper bound of the bytes in use at one time beside the inputs; the output is part of it.
        output: bytes of the merged tensor as it will be stored.
    """

    inputs: int
    work: int
    output: int


@dataclass(frozen=True)
class TensorPlan:
    """One tensor of the output.

    Attributes:
        name: of the tensor.
        treatment: what happens to it, and why.
        spec: dtype and shape of the output.
        position: of its layer in [0, 1].
        dtypes: of the inputs that are read, the base's first; of the base alone if its value stays.
        bytes_read: size of these inputs.
        options: parameters of the method for this tensor.
    """

    name: str
    treatment: Treatment
    spec: TensorSpec
    position: float
    dtypes: tuple[torch.dtype, ...]
    options: MethodParameters

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
        return sum(dtype.itemsize for dtype in self.dtypes) * self.elements


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
        tuned: the models that are merged.
        config: with one entry in `models` per model in `tuned`.
        tensors: by name, in the order they are processed.
        shards: file name to tensor names, in writing order.
        tied_heads: checkpoints that store a head which their config ties to the embedding, as (checkpoint, embedding
            name); the copy is compared with the embedding and not written.
    """

    base: Checkpoint
    tuned: tuple[Checkpoint, ...]
    config: MergeConfig
    tensors: dict[str, TensorPlan]
    shards: dict[str, list[str]]
    tied_heads: tuple[tuple[Checkpoint, str], ...]

    @property
    def inputs(self) -> tuple[Checkpoint, ...]:
        """The checkpoints that are read, the base first, each once even where the base is one of the models."""
        return tuple(dict.fromkeys((self.base, *self.tuned)))

    @property
    def flops(self) -> float:
        """About how many operations the merge takes."""
        return sum(self.cost(name).flops for name in self.tensors)

    def row_wise(self, name: str) -> bool:
        """Whether rows of a tensor may be merged apart, without changing a bit of the result."""
        return self.config.method.row_wise or self.tensors[name].treatment.kind != "merge"

    def cost(self, name: str, shape: tuple[int, ...] | None = None, device_type: str = "cpu") -> Cost:
        """Return what the method takes for a tensor, or for one of another shape treated like it."""
        tensor = self.tensors[name]
        shape = tensor.spec.shape if shape is None else shape
        if tensor.treatment.kind == "base":
            return Cost(tensor.dtypes[0].itemsize * math.prod(shape), 0.0)
        model = elementwise_cost if tensor.treatment.kind == "mean" else self.config.method.cost
        return model(Job(shape, len(self.tuned), self._accumulation(tensor).itemsize, device_type), tensor.options)

    def footprint(self, name: str, rows: int | None = None, device_type: str = "cpu") -> Footprint:
        """Return the memory that `merge_tensors` needs for a tensor, or for some rows of it."""
        tensor = self.tensors[name]
        shape = tensor.spec.shape if rows is None else (rows, *tensor.spec.shape[1:])[: len(tensor.spec.shape)]
        elements = math.prod(shape)
        stored = tensor.spec.dtype.itemsize * elements
        result = tensor.dtypes[0] if tensor.treatment.kind == "base" else self._accumulation(tensor)
        rounding = 0 if result == tensor.spec.dtype else stored  # the wide and the stored tensor
        work = max(self.cost(name, shape, device_type).bytes, result.itemsize * elements + rounding)
        if tensor.treatment.kind != "base" and self.config.dtype is not None:
            loaded: torch.dtype = getattr(torch, self.config.dtype)
            work += sum(dtype != loaded for dtype in tensor.dtypes) * loaded.itemsize * elements
        return Footprint(sum(dtype.itemsize for dtype in tensor.dtypes) * elements, work + _SMALL, stored)

    def groups(self) -> list[list[str]]:
        """Return the names of tensors that take the same work: treatment, shape and dtypes are equal."""
        found: dict[object, list[str]] = {}
        for name, tensor in self.tensors.items():
            key = (tensor.treatment.kind, tensor.spec.shape, tensor.spec.dtype, tensor.dtypes)
            found.setdefault(key, []).append(name)
        return list(found.values())

    def input_files(self) -> list[InputFile]:
        """Return every input file, and in how many passes the order of work reads it."""
        passes: Counter[Path] = Counter()
        size: Counter[Path] = Counter()
        for checkpoint in self.inputs:
            last: TensorHeader | None = None
            for name, tensor in self.tensors.items():
                if tensor.treatment.kind == "base" and checkpoint is not self.base:
                    continue
                header = checkpoint.tensors[name]
                passes[header.file] += last is None or header.file != last.file or header.offset < last.offset
                size[header.file] += header.nbytes
                last = header
        return [InputFile(file, size[file], passes[file]) for file in passes]

    def _accumulation(self, tensor: TensorPlan) -> torch.dtype:
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


def make_plan(
    config: MergeConfig, shard_bytes: int, stem: str | None = None, *, allow_pickle: bool = False
) -> MergePlan:
    """Open every input, check that they fit together, and decide what happens to each tensor.

    Args:
        config: a recipe with models.
        shard_bytes: largest size of an output shard.
        stem: of the output files; None takes the base's.
        allow_pickle: take pickled weights where a model has no others.

    Raises:
        ConfigError: no models, or no base where the method needs one.
        CheckpointError, PickleRefused: an input is missing or damaged, or its tensors are not the base's.
        ShapeError: shapes differ.
        DTypeError: a tensor cannot be merged.
    """
    base, tuned, config = _open_inputs(config, allow_pickle)
    if config.tokenizer_source is not None:
        check_same_vocabulary(base, tuned)
    ignored_head, tied = _tied_heads(base, tuned)
    names = {name: header for name, header in base.tensors.items() if name != ignored_head}
    for checkpoint in tuned:
        others = {name: header for name, header in checkpoint.tensors.items() if name != ignored_head}
        check_same_names(names, others, str(checkpoint.path))
        for name, header in names.items():
            _check_header(name, header.shape, others[name].shape, checkpoint.path)

    positions = layer_positions(names)
    inputs = tuple(dict.fromkeys((base, *tuned)))
    specs, treatments, options = {}, {}, {}
    for name, header in names.items():
        options[name] = config.options(len(tuned), name, positions[name])
        decided = treatment(config, options[name], name, header.shape, header.dtype, len(tuned))
        if decided.kind != "base":
            for checkpoint in tuned:
                if checkpoint.tensors[name].dtype not in FLOAT_DTYPES:
                    raise CheckpointError(
                        f"{checkpoint.path}: {name} is {checkpoint.tensors[name].dtype}, not floating"
                    )
        treatments[name] = decided
        specs[name] = TensorSpec(stored_dtype(config, header.dtype), header.shape)
    layout = plan_shards(specs, shard_bytes)
    shards = {shard_name(stem or base.stem, i, len(layout)): shard for i, shard in enumerate(layout)}
    tensors = {
        name: TensorPlan(
            name, treatments[name], specs[name], positions[name], _dtypes(name, treatments[name], inputs), options[name]
        )
        for name in names
    }
    return MergePlan(base, tuned, config, tensors, shards, tied)


def _open_inputs(config: MergeConfig, allow_pickle: bool) -> tuple[Checkpoint, tuple[Checkpoint, ...], MergeConfig]:
    """Open base and models; a base listed among the models is an input only where no task vectors are formed."""
    if any(entry.model is None for entry in config.models):
        raise ConfigError("every entry of `models` needs a `model`: a folder, a .safetensors file or a model id")
    if config.method.needs_base and config.base_model is None:
        raise ConfigError(f"{config.merge_method} needs base_model: the model that all others were fine-tuned from")
    models = [str(entry.model) for entry in config.models]
    names = [*models, config.base_model] if config.base_model else models
    paths = {name: resolve(name, allow_pickle=allow_pickle) for name in dict.fromkeys(names)}
    entries = config.models
    if config.method.needs_base:
        base_path = paths[names[-1]].resolve()
        entries = tuple(entry for entry in entries if paths[str(entry.model)].resolve() != base_path)
    if not entries:
        raise ConfigError("no fine-tuned models: list at least one under `models` (or with --model)")
    used = [*(str(entry.model) for entry in entries), config.base_model or models[0]]
    opened = {name: Checkpoint(paths[name], allow_pickle=allow_pickle) for name in dict.fromkeys(used)}
    *tuned, base = (opened[name] for name in used)
    return base, tuple(tuned), config.model_copy(update={"models": entries})


def _tied_heads(
    base: Checkpoint, tuned: tuple[Checkpoint, ...]
) -> tuple[str | None, tuple[tuple[Checkpoint, str], ...]]:
    """Find copies of a head that the base's config ties to the embedding: they are no tensors of their own."""
    if not base.config.get("tie_word_embeddings"):
        return None, ()
    embeddings = [name for name in base.tensors if name.endswith(("embed_tokens.weight", "wte.weight"))]
    holders = [checkpoint for checkpoint in dict.fromkeys((base, *tuned)) if _HEAD in checkpoint.tensors]
    if len(embeddings) != 1 or not holders:
        return None, ()
    return _HEAD, tuple((checkpoint, embeddings[0]) for checkpoint in holders if embeddings[0] in checkpoint.tensors)


def _check_header(name: str, expected: tuple[int, ...], got: tuple[int, ...], path: Path) -> None:
    if expected != got:
        hint = "; was its vocabulary resized?" if expected[1:] == got[1:] and len(expected) == 2 else ""
        raise ShapeError(f"{path}: {name} has shape {got}, the base has {expected}{hint}")


def _dtypes(name: str, decided: Treatment, inputs: tuple[Checkpoint, ...]) -> tuple[torch.dtype, ...]:
    read = inputs[:1] if decided.kind == "base" else inputs
    return tuple(checkpoint.tensors[name].dtype for checkpoint in read)
