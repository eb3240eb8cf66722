"""Models given as ``model+adapter``, a checkpoint and a LoRA adapter; their sum is never written to disk."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint import Checkpoint
from ..checkpoint.prefixes import without_prefix
from ..errors import AdapterRefusedError, CheckpointError, ConfigError, DTypeError, ShapeError
from ..files import exists
from ..ops._checks import FLOAT_DTYPES
from .adapter import WEIGHTS_FILE, Adapter, is_head
from .adapter_config import CONFIG_FILE
from .image_adapter import ImageAdapter, is_image_adapter
from .task_part import TaskPart, is_task_part
from .whole_adapter import WholeAdapter

_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "shared.weight", "word_embeddings.weight")
_WITH_HEADS = ("ForCausalLM", "ForConditionalGeneration", "ForMaskedLM", "LMHeadModel")


@dataclass(frozen=True, eq=False)
class AdaptedModel:
    """A checkpoint whose weights an adapter changes; made by `adapt`.

    Attributes:
        base: the checkpoint.
        adapter: the adapter.
        modules: maps the checkpoint's names of changed weights to the keys of the adapter's changes, most of them names
            of modules.
    """

    base: Checkpoint
    adapter: Adapter
    modules: dict[str, str]

    def view(self, base: Checkpoint, names: Mapping[str, str]) -> AdaptedModel:
        """Return this model with some of its tensors, under other names.

        Args:
            base: the view of its checkpoint with these names.
            names: the names that the view has, with those here.
        """
        return AdaptedModel(
            base, copy(self.adapter), {name: self.modules[own] for name, own in names.items() if own in self.modules}
        )

    @property
    def path(self) -> Path:
        """Path of the adapter, which names the model in messages."""
        return self.adapter.path


def adapt(base: Checkpoint, adapter: Adapter) -> AdaptedModel:
    """Find the weight that each module of an adapter changes.

    Args:
        base: the checkpoint.
        adapter: the adapter.

    Returns:
        Both, with the names of the changed weights.

    Raises:
        CheckpointError: the checkpoint lacks such a weight.
        ShapeError: a weight and its update differ in shape.
        DTypeError: a weight is not floating-point, as in quantised models.
        AdapterRefusedError: a weight is changed in two ways, or an embedding without the head that is tied to it.
    """
    modules = {}
    adapter.find_experts(base.tensors)
    for weight_name, shape, key in adapter.weight_shapes():
        if _find(base, weight_name) is None and any(_find(base, other) for other in adapter.copies_of(key)):
            continue  # tied to another tensor, and only that is stored
        name = _weight_name(base, adapter, weight_name)
        header = base.tensors[name]
        if name in modules:
            raise AdapterRefusedError(f"{adapter.path}: changes {name} in two ways, which is not supported")
        rows = shape[:1] == (-1,)  # some rows of any number
        trailing = (1,) * (len(shape) - 2)  # of convolutions of one pixel, which some files have for matrices
        if header.shape[rows:] not in (shape[rows:], shape[:2] if shape[2:] == trailing else shape[rows:]):
            raise ShapeError(
                f"{adapter.path}: the update of {name} has shape {shape}, the weight in {base.path} "
                f"{header.shape}; the adapter belongs to another model, or a vocabulary was resized"
            )
        if header.dtype not in FLOAT_DTYPES:
            raise DTypeError(f"{adapter.path}: changes {name}, which is {header.dtype} in {base.path}; dequantise it")
        if adapter.replaces(key) and _is_head_too(base, name) and not _keeps_ties(adapter, key):
            raise AdapterRefusedError(
                f"{adapter.path}: replaces {name}, which {base.path} also uses as its output head; PEFT trained them "
                "apart, and the merge would change the output head, too. Merge the adapter into its model with PEFT "
                "(merge_and_unload), which unties them, and give the model"
            )
        modules[name] = key
    return AdaptedModel(base, adapter, modules)


def split_reference(model: str) -> tuple[str, str | None]:
    """Split mergekit's ``model+adapter``. An existing path is taken whole, even if its name contains a ``+``.

    Returns:
        The model, and the adapter or None.

    Raises:
        ConfigError: it is ambiguous which ``+`` separates the two.

    Examples:
        >>> split_reference("org/base+org/adapter")
        ('org/base', 'org/adapter')
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
    """Whether a path is an adapter and no model: of PEFT or diffusers, a file of factors, or the parts of a task."""
    if is_task_part(path) or is_image_adapter(path):
        return True
    files = (CONFIG_FILE, WEIGHTS_FILE, "adapter_model.bin")
    weights = ("model.safetensors", "model.safetensors.index.json")
    return any((path / file).is_file() for file in files) and not any((path / file).exists() for file in weights)


def open_adapter(path: Path, allow_pickle: bool = False) -> Adapter:
    """Open an adapter of PEFT, diffusers or kohya, or the parts of a task.

    Raises:
        CheckpointError, AdapterRefusedError, PickleRefusedError: as the classes say.
    """
    if is_task_part(path):
        return TaskPart(path)
    return ImageAdapter(path) if is_image_adapter(path) else WholeAdapter(path, allow_pickle=allow_pickle)


def _is_head_too(base: Checkpoint, name: str) -> bool:
    """Whether a model has the weight of an embedding for its output head. Configs may omit that it is the default."""
    if not name.endswith(_EMBEDDINGS):
        return False
    text = base.config.get("text_config")
    default = text.get("tie_word_embeddings") if isinstance(text, dict) else None
    ties = base.config.get("tie_word_embeddings", default)
    if ties is None:
        architectures = base.config.get("architectures") or [""]
        ties = str(architectures[0]).endswith(_WITH_HEADS)
    return bool(ties) and not any(is_head(other.removesuffix(".weight")) for other in base.tensors)


def _keeps_ties(adapter: Adapter, key: str) -> bool:
    return adapter.config.ensure_weight_tying or bool(adapter.copies_of(key))


def _find(base: Checkpoint, name: str) -> str | None:
    """Return the checkpoint's name of a weight. One of the two names may have a prefix of the model class."""
    if name in base.tensors:
        return name
    similar = [other for other in base.tensors if name.endswith(f".{other}") or other.endswith(f".{name}")]
    # Multimodal models were saved as language_model.model.* and as model.language_model.*
    similar = similar or [other for other in base.tensors if without_prefix(other) == without_prefix(name)]
    return similar[0] if len(similar) == 1 else None


def _weight_name(base: Checkpoint, adapter: Adapter, name: str) -> str:
    if found := adapter.weight_in(base.tensors, name) or _find(base, name):
        return found
    hint = "; it is tied to the embedding" if name.endswith("lm_head.weight") else ""
    trained_on = adapter.config.base_model_name_or_path
    if trained_on is not None:
        hint += f"; according to its config the adapter was trained on {trained_on}"
    raise CheckpointError(f"{adapter.path}: changes {name}, which {base.path} does not have{hint}")
