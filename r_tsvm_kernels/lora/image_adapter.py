"""LoRA files of image models, in the formats of kohya and diffusers: one file of factors, without a configuration.

Modules are named by component and place: ``lora_unet_down_blocks_0_...`` (kohya), ``unet.down_blocks.0...`` (diffusers)
or ``diffusion_model.double_blocks.0...``; a file of one component (diffusers' ``save_lora_adapter``) names places
alone. The base is a diffusers pipeline, one of its components, or a single file that uses the same names for its
layers.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from ..checkpoint import Checkpoint, FileState, read_headers, read_metadata
from ..errors import AdapterRefusedError, CheckpointError
from .adapter import LINEAR, PREFIX
from .adapter_config import AdapterConfig, parse_config
from .whole_adapter import Rest, WholeAdapter

# The file that diffusers writes into a folder.
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
_FACTORS = {
    ".lora_down.weight": 0, ".lora_up.weight": 1, ".lora.down.weight": 0, ".lora.up.weight": 1,
    ".lora_A.weight": 0, ".lora_B.weight": 1,
}  # fmt: skip
_ALPHA = ".alpha"
_OTHER = re.compile(r".*\.(?:hada_|lokr_|lora_mid|dora_scale|lora_magnitude_vector|oft_|diff\b|diff_b\b)")
# Beginnings of names, and the components of a pipeline that they stand for.
_COMPONENTS = {
    "lora_unet_": ("unet", "transformer"), "lora_transformer_": ("transformer",), "lora_te_": ("text_encoder",),
    "lora_te1_": ("text_encoder",), "lora_te2_": ("text_encoder_2",), "lora_te3_": ("text_encoder_3",),
    "unet.": ("unet",), "transformer.": ("transformer",), "text_encoder.": ("text_encoder",),
    "text_encoder_2.": ("text_encoder_2",), "text_encoder_3.": ("text_encoder_3",),
    "diffusion_model.": ("transformer", "unet"),
}  # fmt: skip
_SINGLE_FILE = "model_diffusion_model_"  # of the diffusion model in a single file


class _Scales(AdapterConfig):
    """The scale of every module, instead of patterns."""

    scales: dict[str, float] = Field(default={})
    ranks: dict[str, int] = Field(default={})

    def rank(self, module: str) -> int:
        """Return the rank of a module."""
        return self.ranks[module]

    def scale(self, module: str, rank: int) -> float:
        """Return the factor of ``B @ A`` of a module."""
        return self.scales[module]


class ImageAdapter(WholeAdapter):
    """A LoRA file of an image model.

    Args:
        path: the file, or a folder with the file that diffusers writes.

    Raises:
        CheckpointError: the file is missing or damaged, or a module lacks a factor.
        AdapterRefusedError: it holds LoHa, LoKr, DoRA or others, or modules of unknown components.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        file = self.path / DIFFUSERS_FILE if self.path.is_dir() else self.path
        self._file = Checkpoint(file)
        modules, alphas = _modules(self._file.tensors, str(file))
        stored = {name: f"{PREFIX}{m}{LINEAR[i]}" for m, pair in modules.items() for i, name in enumerate(pair)}
        for module, pair in modules.items():
            shapes = [self._file.tensors[name].shape for name in pair]
            if min(map(len, shapes)) < 2 or 0 in (*shapes[0], *shapes[1]):
                raise AdapterRefusedError(
                    f"{file}: the factors of {module} must be matrices of rank 1 or more, got shapes "
                    f"{shapes[0]} and {shapes[1]}; the file is damaged"
                )
        ranks = {module: self._file.tensors[A].shape[0] for module, (A, _) in modules.items()}
        scales = _scales(ranks, read_metadata(file), str(file))
        scales |= {module: self._alpha(module, name) / ranks[module] for module, name in alphas.items()}
        self.config = _Scales(peft_type="LORA", scales=scales, ranks=ranks)
        self._places_of: tuple[object, dict[str, list[str]]] = (None, {})
        self._file.rename(stored)
        self._open(Rest(self._file, set(alphas.values())), str(file))

    def _alpha(self, module: str, name: str) -> float:
        alpha = self._file.load(name)
        if alpha.numel() != 1 or not math.isfinite(alpha.item()):
            raise AdapterRefusedError(
                f"{self.path}: alpha of {module} must be one finite number, got {tuple(alpha.shape)} "
                f"{alpha.flatten()[:3].tolist()}; the file is damaged"
            )
        return float(alpha.item())

    def files(self) -> tuple[FileState, ...]:
        """Return the file, with its state at opening."""
        return self._file.files()

    def check_unchanged(self) -> None:
        """Compare size and times of the file with its state at opening.

        Raises:
            InputChangedError: it has changed or is missing.
        """
        self._file.check_unchanged()

    def weight_in(self, base: Iterable[str], name: str) -> str | None:
        """Return the base's name of a weight.

        Raises:
            CheckpointError: several weights fit.
        """
        places = self._places(base)
        module = name.removesuffix(".weight")
        prefix = next((x for x in _COMPONENTS if module.startswith(x)), "")
        rest = _flat(module.removeprefix(prefix))
        keys = [*(f"{component}_{rest}" for component in _COMPONENTS.get(prefix, ())), rest, f"{_SINGLE_FILE}{rest}"]
        found = next((places[key] for key in keys if key in places), None)
        if found is not None and len(found) > 1:
            raise CheckpointError(f"{self.path}: {module} may be {' or '.join(found[:3])} of the base")
        return None if found is None else found[0]

    def _places(self, base: Iterable[str]) -> dict[str, list[str]]:
        """Return the names of the base's weights by their flat forms, made once for each base."""
        if self._places_of[0] is not base:
            places: dict[str, list[str]] = {}
            for name in base:
                if name.endswith(".weight"):
                    places.setdefault(_flat(name.removesuffix(".weight")), []).append(name)
            self._places_of = (base, places)
        return self._places_of[1]


def is_image_adapter(path: Path) -> bool:
    """Whether a file holds nothing but factors of a LoRA, or a folder the file of one that diffusers writes."""
    if path.is_dir():
        models = ("model_index.json", "model.safetensors", "model.safetensors.index.json", "adapter_config.json")
        return (path / DIFFUSERS_FILE).is_file() and not any((path / name).exists() for name in models)
    if path.suffix != ".safetensors" or not path.is_file():
        return False
    try:
        names = list(read_headers(path)[0])
    except CheckpointError:
        return False  # the error comes when it is opened
    return bool(names) and all(
        name.endswith((*_FACTORS, _ALPHA)) or _OTHER.match(name) for name in names
    )  # fmt: skip


def _modules(tensors: Mapping[str, Any], source: str) -> tuple[dict[str, tuple[str, str]], dict[str, str]]:
    """Return the names of both factors, and of alpha, by module."""
    pairs: dict[str, list[str | None]] = {}
    of_components = any(name.startswith(tuple(_COMPONENTS)) for name in tensors)
    alphas: dict[str, str] = {}
    for name in tensors:
        ending = next((end for end in _FACTORS if name.endswith(end)), None)
        if _OTHER.match(name) or (ending is None and not name.endswith(_ALPHA)):
            raise AdapterRefusedError(
                f"{source}: {name} is no factor of a LoRA; LoHa, LoKr, DoRA and others are refused"
            )
        if ending is None:
            alphas[name.removesuffix(_ALPHA)] = name
            continue
        module = name.removesuffix(ending)
        if module.startswith(PREFIX):
            raise AdapterRefusedError(f"{source}: a PEFT adapter; give its folder, which has adapter_config.json")
        if of_components and not module.startswith(tuple(_COMPONENTS)):
            raise AdapterRefusedError(
                f"{source}: {module} is of no known component; names begin with {', '.join(_COMPONENTS)}"
            )
        pairs.setdefault(module, [None, None])[_FACTORS[ending]] = name
    found = {module: (A, B) for module, (A, B) in pairs.items() if A is not None and B is not None}
    if len(found) < len(pairs):
        raise CheckpointError(f"{source}: {min(pairs.keys() - found.keys())} lacks a factor")
    if lost := alphas.keys() - found.keys():
        raise CheckpointError(f"{source}: {min(lost)} has alpha, but no factors")
    return found, alphas


def _scales(ranks: Mapping[str, int], metadata: Mapping[str, str], source: str) -> dict[str, float]:
    """Return the scales that the metadata of diffusers gives, or 1."""
    text = metadata.get("lora_adapter_metadata")
    if text is None:
        return dict.fromkeys(ranks, 1.0)
    try:
        settings: Any = json.loads(text)
        if not isinstance(settings, dict):
            raise ValueError(f"expected an object, got {settings!r:.40}")
        prefixes = {key[: key.find(".") + 1] for key in settings}  # of components; empty in a file of one
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{source}: its lora_adapter_metadata is not valid: {error}") from error
    found = dict.fromkeys(ranks, 1.0)
    for prefix in prefixes:
        own = {key.removeprefix(prefix): value for key, value in settings.items() if key.startswith(prefix)}
        config = parse_config({"peft_type": "LORA", **own}, source)
        for module, rank in ranks.items():
            if module.startswith(prefix):
                found[module] = config.scale(module.removeprefix(prefix), rank)
    return found


def _flat(name: str) -> str:
    return re.sub(r"[./]", "_", name)
