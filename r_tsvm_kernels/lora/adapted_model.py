"""Models given as a checkpoint and a LoRA adapter, ``model+adapter``: the sum is never written anywhere."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..checkpoint import Checkpoint
from ..errors import CheckpointError, ConfigError, DTypeError, ShapeError
from ..files import exists
from ..ops._checks import FLOAT_DTYPES
from .adapter import WEIGHTS_FILE, Adapter
from .adapter_config import CONFIG_FILE


@dataclass(frozen=True, eq=False)
class AdaptedModel:
    """A checkpoint whose weights an adapter changes; made by `adapt`.

    Attributes:
        base: the checkpoint.
        adapter: the adapter.
        modules: names of the weights it changes, as the checkpoint has them, to names of its modules.
    """

    base: Checkpoint
    adapter: Adapter
    modules: dict[str, str]

    @property
    def path(self) -> Path:
        """Of the adapter, by which messages name the model."""
        return self.adapter.path


def adapt(base: Checkpoint, adapter: Adapter) -> AdaptedModel:
    """Find the weight that each module of an adapter changes.

    Raises:
        CheckpointError: the checkpoint has no such weight.
        ShapeError: it has another shape than the update.
        DTypeError: it is not floating, as that of a quantised model.
    """
    modules = {}
    for module in adapter.modules.values():
        name = _weight_name(base, adapter, module.weight_name)
        header = base.tensors[name]
        shape = module.shape[::-1] if module.transposed else module.shape
        if header.shape != shape:
            raise ShapeError(
                f"{adapter.path}: the update of {name} has shape {shape}, the weight in {base.path} "
                f"{header.shape}; the adapter was made for another model, or a vocabulary was resized"
            )
        if header.dtype not in FLOAT_DTYPES:
            raise DTypeError(f"{adapter.path}: changes {name}, which is {header.dtype} in {base.path}; dequantise it")
        modules[name] = module.name
    return AdaptedModel(base, adapter, modules)


def split_reference(model: str) -> tuple[str, str | None]:
    """Split mergekit's ``model+adapter``; a path that exists goes first, whatever is in its name.

    Raises:
        ConfigError: it cannot be told which ``+`` divides the two.
    """
    if "+" not in model or exists(model):
        return model, None
    splits = [(model[:i], model[i + 1 :]) for i, letter in enumerate(model) if letter == "+"]
    if len(splits) > 1:
        splits = [split for split in splits if all(map(exists, split))]
    if len(splits) != 1 or not all(splits[0]):
        raise ConfigError(f"{model}: expected a model, or model+adapter with one adapter, each a path or a model id")
    return splits[0]


def is_adapter(path: Path) -> bool:
    """Whether a folder holds an adapter, and no model beside it."""
    files = (CONFIG_FILE, WEIGHTS_FILE)
    weights = ("model.safetensors", "model.safetensors.index.json")
    return any((path / file).is_file() for file in files) and not any((path / file).exists() for file in weights)


def _weight_name(base: Checkpoint, adapter: Adapter, name: str) -> str:
    """Return the name that the checkpoint has for a weight: it may lack the prefix of the model class, or have one."""
    if name in base.tensors:
        return name
    similar = [other for other in base.tensors if name.endswith(f".{other}") or other.endswith(f".{name}")]
    if len(similar) == 1:
        return similar[0]
    hint = "; it is tied to the embedding" if name.endswith("lm_head.weight") else ""
    raise CheckpointError(
        f"{adapter.path}: changes {name}, which {base.path} does not have{hint}; "
        f"the adapter says that it was trained on {adapter.config.base_model_name_or_path}"
    )
