"""The plan of a merge, from headers alone: what happens to each tensor and where it will be written."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ..config import MergeConfig
from ..errors import CheckpointError, ConfigError, ShapeError
from ..merge import Treatment, check_same_names, stored_dtype, treatment
from ..ops import FLOAT_DTYPES
from ..parameters import layer_positions
from .reader import Checkpoint
from .writer import TensorSpec, plan_shards, shard_name

# The output head of a model whose config ties it to the embedding.
_HEAD = "lm_head.weight"


@dataclass(frozen=True)
class TensorPlan:
    """One tensor of the output."""

    name: str
    treatment: Treatment
    spec: TensorSpec
    position: float
    bytes_read: int


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
    def bytes_written(self) -> int:
        """Size of the merged tensors in bytes."""
        return sum(plan.spec.nbytes for plan in self.tensors.values())

    @property
    def bytes_read(self) -> int:
        """Bytes of tensor values read from all inputs."""
        return sum(plan.bytes_read for plan in self.tensors.values())


def make_plan(config: MergeConfig, shard_bytes: int, stem: str | None = None) -> MergePlan:
    """Open every input, check that they fit together, and decide what happens to each tensor.

    Args:
        config: a recipe with models.
        shard_bytes: largest size of an output shard.
        stem: of the output files; None takes the base's.

    Raises:
        ConfigError: no models, or no base where the method needs one.
        CheckpointError, PickleRefused: an input is damaged, or its tensors are not the base's.
        ShapeError: shapes differ.
        DTypeError: a tensor cannot be merged.
    """
    base, tuned, config = _open_inputs(config)
    ignored_head, tied = _tied_heads(base, tuned)
    names = {name: header for name, header in base.tensors.items() if name != ignored_head}
    for checkpoint in tuned:
        others = {name: header for name, header in checkpoint.tensors.items() if name != ignored_head}
        check_same_names(names, others, str(checkpoint.path))
        for name, header in names.items():
            _check_header(name, header.shape, others[name].shape, checkpoint.path)

    positions = layer_positions(names)
    specs, treatments = {}, {}
    for name, header in names.items():
        options = config.options(len(tuned), name, positions[name])
        decided = treatment(config, options, name, header.shape, header.dtype, len(tuned))
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
            name, treatments[name], specs[name], positions[name], _bytes_read(name, treatments[name], base, tuned)
        )
        for shard in layout
        for name in shard
    }
    return MergePlan(base, tuned, config, tensors, shards, tied)


def parse_size(text: str | int) -> int:
    """Parse ``5GB``, ``500MB``, ``2GiB`` or a number of bytes.

    Raises:
        ConfigError: not a positive size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", str(text), re.IGNORECASE)
    if match:
        exponent = " KMGT".index(match[2].upper() or " ")
        size = int(float(match[1]) * (1024 if match[3] else 1000) ** exponent)
        if size > 0:
            return size
    raise ConfigError(f"expected a size such as 5GB or 500MB, got {text!r}")


def _open_inputs(config: MergeConfig) -> tuple[Checkpoint, tuple[Checkpoint, ...], MergeConfig]:
    """Open base and models; a base listed among the models is an input only where no task vectors are formed."""
    if any(entry.model is None for entry in config.models):
        raise ConfigError("every entry of `models` needs a `model`: a folder or a .safetensors file")
    if config.method.needs_base:
        if config.base_model is None:
            raise ConfigError(f"{config.merge_method} needs base_model: the model that all others were fine-tuned from")
        entries = tuple(e for e in config.models if not _same_path(str(e.model), config.base_model))
    else:
        entries = config.models
    if not entries:
        raise ConfigError("no fine-tuned models: list at least one under `models` (or with --model)")
    opened = {path: Checkpoint(path) for path in dict.fromkeys(str(entry.model) for entry in entries)}
    tuned = tuple(opened[str(entry.model)] for entry in entries)
    base_path = config.base_model or str(entries[0].model)
    base = opened.get(base_path) or Checkpoint(base_path)
    return base, tuned, config.model_copy(update={"models": entries})


def _same_path(first: str, second: str) -> bool:
    return first == second or Path(first).resolve() == Path(second).resolve()


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


def _bytes_read(name: str, decided: Treatment, base: Checkpoint, tuned: tuple[Checkpoint, ...]) -> int:
    headers = [base.tensors[name]]
    if decided.kind != "base":
        headers += [checkpoint.tensors[name] for checkpoint in tuned]
    return sum(TensorSpec(header.dtype, header.shape).nbytes for header in headers)
