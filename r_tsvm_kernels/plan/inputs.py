"""Open the inputs of a recipe: the base, the models, and the adapters that change some of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint import Checkpoint
from ..checkpoint.hub import resolve
from ..config import MergeConfig
from ..errors import CheckpointError, ConfigError
from ..lora import Adapter
from ..lora.adapted_model import AdaptedModel, adapt, is_adapter, open_adapter, split_reference
from ..lora.task_part import TaskPart
from ..missing import without_base
from ..parts import check_recipe
from ..parts_folder import PartsFolder
from ..steps import placed


@dataclass(frozen=True)
class Inputs:
    """The opened inputs of a merge.

    Attributes:
        base: the checkpoint whose layout, buffers and configuration files the output has.
        tuned: the models that are merged: checkpoints, or checkpoints that an adapter changes. The base is one of them
            only if the method forms no task vectors.
        config: with one entry in `models` per model in `tuned`.
        parts: the folder of parts that the recipe names; the models are then the base with the parts of a task.
    """

    base: Checkpoint
    tuned: tuple[Checkpoint | AdaptedModel, ...]
    config: MergeConfig
    parts: PartsFolder | None = None


class Opener:
    """Opens the checkpoints and adapters of a recipe, each file once. All take the names of the one opened first.

    Args:
        config: the recipe; adapters given alone belong to its base.
        allow_pickle: read models that exist only as pickle.

    Attributes:
        base_path: its path; None without a base.
    """

    def __init__(self, config: MergeConfig, allow_pickle: bool) -> None:
        self.allow_pickle = allow_pickle
        self._places, self._names = config.places, config.steps.keys()
        base = config.base_model
        with _telling_where(config):
            self.base_path = _base_path(None if base is None else self._placed(base), allow_pickle)
        self._checkpoints: dict[Path, Checkpoint] = {}
        self._adapters: dict[Path, Adapter] = {}

    def checkpoint(self, path: Path) -> Checkpoint:
        """Open a checkpoint."""
        key, opened = path.resolve(), self._checkpoints
        if key not in opened:
            opened[key] = Checkpoint(path, allow_pickle=self.allow_pickle)
            opened[key].take_names(next(iter(opened.values())))
        return opened[key]

    def paths(self, model: str) -> tuple[Path, Path | None]:
        """Return the paths of the checkpoint and the adapter of a model; an adapter alone changes the base."""
        return _paths(self._placed(model), self.base_path, self.allow_pickle)

    def _placed(self, model: str) -> str:
        return placed(model, self._places, self._names)

    def model(self, path: Path, adapter_path: Path | None) -> Checkpoint | AdaptedModel:
        """Open a model whose paths are known."""
        model = self.checkpoint(path)
        if adapter_path is None:
            return model
        key = adapter_path.resolve()
        self._adapters[key] = self._adapters.get(key) or open_adapter(adapter_path, self.allow_pickle)
        return adapt(model, self._adapters[key])


def open_inputs(config: MergeConfig, allow_pickle: bool = False, opener: Opener | None = None) -> Inputs:
    """Open the base and the models of a recipe, each file once.

    Raises:
        ConfigError: no models, or no base where the method needs one, or a base that is an adapter.
        CheckpointError, PickleRefusedError, QuantisedRefusedError, AdapterRefusedError: an input cannot be used.
    """
    if any(entry.model is None for entry in config.models):
        raise ConfigError("every entry of `models` needs a `model`: a folder, a .safetensors file or a model id")
    if config.parts is not None and not config.models:
        raise ConfigError(
            f"parts: the recipe names no models; give the one that was decomposed ({config.parts} has it, as "
            "merge_recipe.yaml), or none: rtsvm merge --parts PARTS OUT"
        )
    require_base(config)
    opener = opener or Opener(config, allow_pickle)
    base_path = opener.base_path
    if config.parts is not None and base_path is not None:
        return _open_parts(config, base_path, allow_pickle)
    found = [(entry, *opener.paths(str(entry.model))) for entry in config.models]
    is_base = [
        adapter is None and base_path is not None and path.resolve() == base_path.resolve()
        for _, path, adapter in found
    ]
    forms_vectors = config.method.forms_vectors(base_path is not None)
    if not found or (forms_vectors and all(is_base)):
        known = f"{config.models[0].model} is the base itself; " if config.models else ""
        raise ConfigError(f"no fine-tuned models: {known}list at least one under `models` (or with --model)")
    if forms_vectors:
        found = [model for model, base_itself in zip(found, is_base, strict=True) if not base_itself]
        entries = tuple(entry for entry, _, _ in found)
    else:  # one name for the base, so that `base_joins` sees whether it is listed
        entries = tuple(
            entry.model_copy(update={"model": config.base_model}) if base_itself else entry
            for entry, base_itself in zip(config.models, is_base, strict=True)
        )
    config = config.model_copy(update={"models": entries})
    config = without_base(config) if base_path is None else config
    if config.base_joins and base_path is not None:
        config = config.with_base_listed()
        found.append((config.models[-1], base_path, None))
    base = opener.checkpoint(found[0][1] if base_path is None else base_path)
    return Inputs(base, tuple(opener.model(path, adapter) for _, path, adapter in found), config)


def require_base(config: MergeConfig, base_model: str | None = None) -> None:
    """Require a base if the method needs one.

    Raises:
        ConfigError: there is none.
    """
    if config.method.needs_base and config.base_model is None and base_model is None:
        raise ConfigError(f"{config.merge_method} needs base_model: the model that all others were fine-tuned from")


def _open_parts(config: MergeConfig, base_path: Path, allow_pickle: bool) -> Inputs:
    """Open the base and the parts that a recipe names; its models are not needed.

    Raises:
        ConfigError: the parts are of another recipe.
        CheckpointError: the parts are damaged, or the base has other tensors.
    """
    folder = PartsFolder.open(str(config.parts))
    check_recipe(config, folder)
    with _telling_where(config):
        base = Checkpoint(base_path, allow_pickle=allow_pickle)
    for name, own in folder.tensors.items():
        header = base.tensors.get(name)
        if header is None or header.shape != own.shape:
            found = "no such tensor" if header is None else f"shape {header.shape}"
            raise CheckpointError(
                f"{folder.path}: {name} has shape {own.shape}, and {base.path} has {found}; give the base that was "
                "decomposed, or decompose again"
            )
    parts = [TaskPart(folder.path / task.file, folder, config.parts_rank) for task in folder.tasks]
    tuned = tuple(AdaptedModel(base, part, {name: name for name in part.kinds}) for part in parts)
    models = tuple(entry for entry in config.models if entry.model != config.base_model)
    config = config.model_copy(update={"models": models})
    return Inputs(base, tuned, config, folder)


@contextmanager
def _telling_where(config: MergeConfig) -> Iterator[None]:
    """Add to the error of a base that is not found how to name it, for parts are merged wherever they are."""
    try:
        yield
    except CheckpointError as error:
        if config.parts is None or type(error) is not CheckpointError:  # others, such as pickles, say what to do
            raise
        raise CheckpointError(
            f"{error}; if the base of the parts is at another place now, name it with --base (base=)"
        ) from error


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
    """Return the paths of the checkpoint and the adapter of a model; an adapter alone changes the base."""
    name, adapter = split_reference(model)
    path = resolve(name, allow_pickle=allow_pickle)
    if adapter is not None:
        return path, resolve(adapter)
    if not is_adapter(path):
        return path, None
    if base_path is None:
        raise ConfigError(f"{model} is a LoRA adapter: write model+adapter, or set base_model to its base")
    return base_path, path


def sources(base: Checkpoint, tuned: Sequence[Checkpoint | AdaptedModel]) -> tuple[Checkpoint | Adapter, ...]:
    """Return the checkpoints and adapters of a base and its models, each once, the base first."""
    found: list[Checkpoint | Adapter] = [base]
    for model in tuned:
        found += [model.base, model.adapter] if isinstance(model, AdaptedModel) else [model]
    return tuple(dict.fromkeys(found))
