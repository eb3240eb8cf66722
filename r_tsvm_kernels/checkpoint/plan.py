"""The plan of a merge, from headers alone: what happens to each tensor and where it will be written."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..config import MergeConfig
from ..errors import CheckpointError, ConfigError, QuantisedRefusedError, ShapeError
from ..merge import Treatment, check_options, check_same_names, stored_dtype, treatment
from ..methods import Cost, MethodParameters, TensorJob, elementwise_cost, factored_cost
from ..ops import FLOAT_DTYPES
from ..parameters import count_layers, layer_positions
from .adapted import AdaptedModel, adapt, is_adapter, split_reference
from .adapter import Adapter
from .copies import Copy, settle_copies, shared_seeds
from .headers import TensorHeader
from .hub import resolve
from .reader import Checkpoint
from .vocabulary import check_same_vocabulary
from .writer import TensorSpec, plan_shards, shard_name

# Scalars, masks of a row, whole pages.
_SMALL = 1 << 19


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

    @property
    def inputs(self) -> tuple[Checkpoint | Adapter, ...]:
        """What is read, the base first, each once even where the base is one of the models."""
        return _inputs(self.base, self.tuned)

    @property
    def flops(self) -> float:
        """About how many operations the merge takes."""
        return sum(self.cost(name).flops for name in self.tensors)

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

    def cost(self, name: str, shape: tuple[int, ...] | None = None, device_type: str = "cpu") -> Cost:
        """Return what the method takes for a tensor, or for one of another shape treated like it."""
        tensor = self.tensors[name]
        shape = tensor.spec.shape if shape is None else shape
        if tensor.treatment.kind == "base":
            return Cost(tensor.dtypes[0].itemsize * math.prod(shape), 0.0)
        job = TensorJob(shape, len(self.tuned), self.accumulation(tensor).itemsize, device_type)
        if self.keeps_factors(name):
            return factored_cost(job, self.update_ranks(name))
        model = elementwise_cost if tensor.treatment.kind == "mean" else self.config.method.cost
        cost = model(job, tensor.options)
        # The tuned tensors, formed one after the other, and a wide copy of what the update is added to.
        formed = sum(isinstance(model, AdaptedModel) for model in self.tuned) + 1 if tensor.factor_ranks else 0
        flops = 2.0 * job.elements * sum(self.update_ranks(name))
        return Cost(cost.bytes + formed * job.itemsize * job.elements, cost.flops + flops)

    def update_ranks(self, name: str) -> list[int]:
        """Return the inner dimension of the update that each model with an adapter has for a tensor, 0 for none."""
        ranks = {self.inputs[part.source]: part.rank or 0 for part in self.tensors[name].parts}
        return [ranks.get(model.adapter, 0) for model in self.tuned if isinstance(model, AdaptedModel)]

    def footprint(self, name: str, rows: int | None = None, device_type: str = "cpu") -> Footprint:
        """Return the memory that `merge_tensors` needs for a tensor, or for some rows of it."""
        tensor = self.tensors[name]
        shape = tensor.spec.shape if rows is None else (rows, *tensor.spec.shape[1:])[: len(tensor.spec.shape)]
        elements = math.prod(shape)
        stored = tensor.spec.dtype.itemsize * elements
        result = tensor.dtypes[0] if tensor.treatment.kind == "base" else self.accumulation(tensor)
        rounding = 0 if result == tensor.spec.dtype else stored  # the wide and the stored tensor
        work = max(self.cost(name, shape, device_type).bytes, result.itemsize * elements + rounding)
        if tensor.treatment.kind != "base" and self.config.dtype is not None:
            loaded: torch.dtype = getattr(torch, self.config.dtype)
            rounded = sum(part.rank is None and part.dtype != loaded for part in tensor.parts)
            work += rounded * loaded.itemsize * elements
        return Footprint(sum(part.nbytes(elements) for part in tensor.parts), work + _SMALL, stored)

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
        ConfigError: no models, or no base where the method needs one; one file for several modules; a pattern that
            matches no tensor; or a weight beyond the dtype of a merge.
        CheckpointError, PickleRefusedError: an input is missing or damaged, or its tensors are not the base's.
        QuantisedRefusedError: an input is quantised.
        ShapeError: shapes differ.
        DTypeError: a tensor cannot be merged.
    """
    base, tuned, config = _open_inputs(config, allow_pickle)
    inputs = _inputs(base, tuned)
    checkpoints = [source for source in inputs if isinstance(source, Checkpoint)]
    config.check_patterns(base.tensors)
    if config.tokenizer_source is not None:
        check_same_vocabulary(base, checkpoints[1:])
    if config.num_layers is not None and config.num_layers != (layers := count_layers(base.tensors)):
        raise ConfigError(
            f"slices: {config.num_layers} layers were asked for, but {base.path} has {layers}; only whole models "
            "are merged"
        )
    copies = settle_copies(base, checkpoints[1:])
    dropped = {(copy.checkpoint, copy.name) for copy in copies if copy.dropped}
    names = {name: header for name, header in base.tensors.items() if (base, name) not in dropped}
    for checkpoint in checkpoints[1:]:
        others = {n: header for n, header in checkpoint.tensors.items() if (checkpoint, n) not in dropped}
        check_same_names(names, others, str(checkpoint.path))
        for name, header in names.items():
            _check_header(name, header.shape, others[name].shape, checkpoint.path)
    adapted = [model for model in tuned if isinstance(model, AdaptedModel)]
    for model in adapted:
        if changed := [name for name in model.modules if (model.base, name) in dropped]:
            raise CheckpointError(f"{model.path}: changes {changed[0]}, which the base ties to the embedding")
    seeds = shared_seeds(base, checkpoints[1:]) if "seed" in config.method.parameters.model_fields else {}

    positions = layer_positions(names)
    specs, treatments, options = {}, {}, {}
    for name, header in names.items():
        options[name] = config.options(len(tuned), name, positions[name], seeded_by=seeds.get(name))
        decided = treatment(config, options[name], name, header.shape, header.dtype, len(tuned))
        if decided.kind != "base":
            for checkpoint in checkpoints:
                if checkpoint.tensors[name].dtype not in FLOAT_DTYPES:
                    raise QuantisedRefusedError(
                        f"{checkpoint.path}: {name} is {checkpoint.tensors[name].dtype}, where the base has "
                        f"{header.dtype}; if the model is quantised, dequantise it and merge that; if the tensor is a "
                        "mask or another buffer, exclude it"
                    )
            unchanged = all(model.base is base and name not in model.modules for model in adapted)
            if config.method.needs_base and len(adapted) == len(tuned) and unchanged:
                decided = Treatment("base", "no adapter changes it")
        treatments[name] = decided
        specs[name] = TensorSpec(stored_dtype(config, header.dtype), header.shape)
    shards = _shards(base, specs, shard_bytes, stem)
    tensors = {
        name: TensorPlan(
            name,
            treatments[name],
            specs[name],
            positions[name],
            _parts(name, treatments[name], inputs, adapted),
            options[name],
            seeds.get(name),
        )
        for name in names
    }
    plan = MergePlan(base, tuned, config, tensors, shards, copies)
    for name, tensor in tensors.items():
        if tensor.treatment.kind != "base":
            check_options(tensor.options, plan.accumulation(tensor), name)
    return plan


def _shards(base: Checkpoint, specs: dict[str, TensorSpec], shard_bytes: int, stem: str | None) -> dict[str, list[str]]:
    """Distribute the tensors of each module over files in its folder; indexes are read of main modules only."""
    if stem is not None and any(module.prefix for module in base.modules):
        folders = ", ".join(module.folder or "." for module in base.modules)
        raise ConfigError(f"{base.path} has modules of its own in folders ({folders}); choose a folder as the output")
    shards = {}
    for module in base.modules:
        own = {name: spec for name, spec in specs.items() if base.module(name) is module}
        # Of the loaders of sentence-transformers only that of a transformer, which has a config, reads an index.
        divided = not module.prefix and (len(base.folders) == 1 or base.config)
        layout = plan_shards(own, shard_bytes if divided else 2**63)
        folder = "" if stem is not None or not module.folder else f"{module.folder}/"
        for index, names in enumerate(layout):
            shards[folder + shard_name(stem or module.weights.stem, index, len(layout))] = names
    return shards


def _open_inputs(
    config: MergeConfig, allow_pickle: bool
) -> tuple[Checkpoint, tuple[Checkpoint | AdaptedModel, ...], MergeConfig]:
    """Open base and models; the base is one of the models only where no task vectors are formed."""
    if any(entry.model is None for entry in config.models):
        raise ConfigError("every entry of `models` needs a `model`: a folder, a .safetensors file or a model id")
    if config.method.needs_base and config.base_model is None:
        raise ConfigError(f"{config.merge_method} needs base_model: the model that all others were fine-tuned from")
    base_path = _base_path(config.base_model, allow_pickle)
    found = [(entry, *_paths(str(entry.model), base_path, allow_pickle)) for entry in config.models]
    is_base = [
        adapter is None and base_path is not None and path.resolve() == base_path.resolve()
        for _, path, adapter in found
    ]
    if not found or (config.method.needs_base and all(is_base)):
        known = f"{config.models[0].model} is the base itself; " if config.models else ""
        raise ConfigError(f"no fine-tuned models: {known}list at least one under `models` (or with --model)")
    if config.method.needs_base:
        found = [model for model, base_itself in zip(found, is_base, strict=True) if not base_itself]
        entries = tuple(entry for entry, _, _ in found)
    else:  # one name for the base, by which `base_joins` knows whether it is listed
        entries = tuple(
            entry.model_copy(update={"model": config.base_model}) if base_itself else entry
            for entry, base_itself in zip(config.models, is_base, strict=True)
        )
    config = config.model_copy(update={"models": entries})
    if config.base_joins and base_path is not None:
        config = config.with_base_listed()
        found.append((config.models[-1], base_path, None))
    checkpoints: dict[Path, Checkpoint] = {}
    adapters: dict[Path, Adapter] = {}

    def opened(path: Path) -> Checkpoint:
        key = path.resolve()
        checkpoints[key] = checkpoints.get(key) or Checkpoint(path, allow_pickle=allow_pickle)
        return checkpoints[key]

    base = opened(found[0][1] if base_path is None else base_path)
    tuned: list[Checkpoint | AdaptedModel] = []
    for _, path, adapter_path in found:
        model = opened(path)
        if adapter_path is None:
            tuned.append(model)
        else:
            key = adapter_path.resolve()
            adapters[key] = adapters.get(key) or Adapter(adapter_path)
            tuned.append(adapt(model, adapters[key]))
    return base, tuple(tuned), config


def _base_path(base_model: str | None, allow_pickle: bool) -> Path | None:
    if base_model is None:
        return None
    name, adapter = split_reference(base_model)
    path = resolve(name, allow_pickle=allow_pickle)
    if adapter is not None or is_adapter(path):
        raise ConfigError(
            f"base_model: {base_model} is a LoRA adapter; name the model that it was trained on, "
            "and list the adapter under `models`"
        )
    return path


def _paths(model: str, base_path: Path | None, allow_pickle: bool) -> tuple[Path, Path | None]:
    """Return the paths of the checkpoint and of the adapter of a model; an adapter alone belongs to the base."""
    name, adapter = split_reference(model)
    path = resolve(name, allow_pickle=allow_pickle)
    if adapter is not None:
        return path, resolve(adapter)
    if not is_adapter(path):
        return path, None
    if base_path is None:
        raise ConfigError(f"{model} is a LoRA adapter: write model+adapter, or set base_model to its base")
    return base_path, path


def _inputs(base: Checkpoint, tuned: Sequence[Checkpoint | AdaptedModel]) -> tuple[Checkpoint | Adapter, ...]:
    found: list[Checkpoint | Adapter] = [base]
    for model in tuned:
        found += [model.base, model.adapter] if isinstance(model, AdaptedModel) else [model]
    return tuple(dict.fromkeys(found))


def _check_header(name: str, expected: tuple[int, ...], got: tuple[int, ...], path: Path) -> None:
    if expected != got:
        hint = "; was its vocabulary resized?" if expected[1:] == got[1:] and len(expected) == 2 else ""
        raise ShapeError(f"{path}: {name} has shape {got}, the base has {expected}{hint}")


def _parts(
    name: str, decided: Treatment, inputs: Sequence[Checkpoint | Adapter], adapted: Sequence[AdaptedModel]
) -> tuple[Part, ...]:
    """Return what is read for a tensor: of the base alone if its value stays."""
    modules = {model.adapter: model.modules for model in adapted}
    found = []
    for index, source in enumerate(inputs[:1] if decided.kind == "base" else inputs):
        if isinstance(source, Checkpoint):
            found.append(Part(index, source.tensors[name].dtype))
        elif name in modules[source]:
            A, B = source.headers(modules[source][name])
            rank = A.shape[0]
            found.append(Part(index, torch.promote_types(A.dtype, B.dtype), rank, A.nbytes + B.nbytes))
    return tuple(found)
