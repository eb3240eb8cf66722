"""Read, check and make the adapter_config.json of PEFT."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..checkpoint import FileState, read_json
from ..errors import AdapterRefusedError, CheckpointError

Number = TypeVar("Number", int, float)

CONFIG_FILE = "adapter_config.json"

# Settings that make an adapter more than `scale * B @ A`, with the reason.
_REFUSED = {
    "use_dora": "DoRA also rescales the columns of the weight",
    "use_qalora": "QALoRA pools the inputs of the adapter",
    "use_bdlora": "BD-LoRA has block-diagonal factors",
    "modules_to_save": "it replaces whole modules",
    "trainable_token_indices": "it replaces rows of the embedding",
    "target_parameters": "it adapts bare parameters, not modules",
    "layer_replication": "it repeats layers of the base",
    "lora_bias": "its factors have biases",
    "alora_invocation_tokens": "activated LoRA acts on some tokens only",
    "arrow_config": "Arrow routes each token to other adapters",
    "kasa_config": "KaSA changes the base",
    "velora_config": "VeLoRA is not plain LoRA",
    "monteclora_config": "MonteCLoRA samples its factors",
}
# Other initialisations change the base weights: the update belongs to a base that is not stored anywhere.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


class AdapterConfig(BaseModel):
    """The settings that decide what an adapter adds to the weights; other settings are ignored.

    Attributes:
        peft_type: ``LORA``.
        task_type: e.g. ``CAUSAL_LM``; decides the class that PEFT wraps the model in.
        base_model_name_or_path: the model that the adapter was trained on.
        r: rank of modules that match no `rank_pattern`.
        lora_alpha: numerator of the scale of modules that match no `alpha_pattern`.
        rank_pattern: ranks of modules, by regular expression.
        alpha_pattern: numerators of modules, by regular expression.
        use_rslora: divide by the square root of the rank.
        fan_in_fan_out: whether weights are stored (in, out), as in GPT-2.
        init_lora_weights: how the factors were initialised.
        bias: ``none``, ``all`` or ``lora_only``: which biases the adapter replaces.
        use_dora: whether rows of the sums are scaled, see `changes.Dora`.
        modules_to_save: modules that the adapter replaces.
        target_parameters: bare parameters that the adapter adapts, such as packed experts, by the ends of their names.
        trainable_token_indices: rows of embeddings that the adapter replaces, by module or of the input embedding.
        ensure_weight_tying: whether what is tied in the base stays so where the adapter replaces it.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    peft_type: str
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    r: int = Field(default=8, ge=1)
    lora_alpha: float = Field(default=8.0, allow_inf_nan=False)
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, Annotated[float, Field(allow_inf_nan=False)]] = {}
    use_rslora: bool = False
    fan_in_fan_out: bool = False
    init_lora_weights: bool | str | None = True
    bias: str = "none"
    use_dora: bool = False
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    target_parameters: list[str] | None = None
    ensure_weight_tying: bool = False

    @property
    def replaces_tensors(self) -> bool:
        """Whether the adapter holds whole tensors in place of some of the base."""
        return bool(self.modules_to_save) or self.bias != "none"

    def token_indices(self, module: str) -> tuple[int, ...]:
        """Return the rows of an embedding that the adapter replaces."""
        given = self.trainable_token_indices or []
        if isinstance(given, dict):
            given = next((rows for name, rows in given.items() if f".{module}".endswith(f".{name}")), [])
        return tuple(given)

    def rank(self, module: str) -> int:
        """Return the rank of a module."""
        return _lookup(self.rank_pattern, module, self.r)

    def scale(self, module: str, rank: int) -> float:
        """Return the factor of ``B @ A`` of a module."""
        alpha = _lookup(self.alpha_pattern, module, self.lora_alpha)
        return alpha / (rank**0.5 if self.use_rslora else rank)


def read_config(folder: Path, accepted: Collection[str] = ()) -> tuple[AdapterConfig, FileState]:
    """Read and check the ``adapter_config.json`` of a folder; for `accepted` see `parse_config`.

    Returns:
        The config, and the state of the file.

    Raises:
        CheckpointError: the file is missing or damaged, or no config of an adapter.
        AdapterRefusedError: not LoRA, or more than a low-rank update; the message names the setting.
    """
    file = folder / CONFIG_FILE
    if not file.is_file():
        raise CheckpointError(f"{folder}: no {CONFIG_FILE}; expected the folder of a PEFT adapter")
    data, state = read_json(file)
    return parse_config(data, str(file), accepted), state


def parse_config(data: Mapping[str, Any], source: str, accepted: Collection[str] = ()) -> AdapterConfig:
    """Check the content of an ``adapter_config.json``, or PEFT's ``LoraConfig.to_dict()``.

    Args:
        data: settings by name.
        source: origin of the settings, for messages.
        accepted: settings beyond plain LoRA that the caller can carry out.

    Returns:
        The settings that decide the update.

    Raises:
        CheckpointError: not a valid configuration.
        AdapterRefusedError: not LoRA, or more than a low-rank update; the message names the setting.

    Examples:
        >>> parse_config({"peft_type": "LORA", "r": 16, "lora_alpha": 32}, "example").scale("model.q_proj", 16)
        2.0
    """
    if data.get("peft_type") != "LORA":
        raise AdapterRefusedError(f"{source}: peft_type is {str(data.get('peft_type'))[:40]!a}; only LORA is supported")
    for key, value in data.items():
        unknown = key.startswith("use_") and key != "use_rslora"
        if value and key not in accepted and (key in _REFUSED or unknown):
            raise AdapterRefusedError(
                f"{source}: {key[:40]} is set: {_REFUSED.get(key, 'unknown here')}; not supported"
            )
    try:
        # PEFT writes null where a pattern is empty.
        config = AdapterConfig(**{key: value for key, value in data.items() if value is not None})
        for pattern in (*config.rank_pattern, *config.alpha_pattern):
            re.compile(pattern)
    except (ValidationError, re.error) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{source}: not a valid LoRA config: {reason[:300]}") from None
    if config.bias != "none" and not ("bias" in accepted and config.bias in ("all", "lora_only")):
        raise AdapterRefusedError(
            f"{source}: bias is {config.bias[:40]!a}: it replaces biases of the base; not supported"
        )
    if config.init_lora_weights not in _PLAIN_STARTS:
        raise AdapterRefusedError(
            f"{source}: init_lora_weights is {str(config.init_lora_weights)[:40]!a}, which changes the base; convert "
            "the adapter first (PEFT: save_pretrained with path_initial_model_for_weight_conversion)"
        )
    return config


def make_config(
    ranks: Mapping[str, int],
    scales: Mapping[str, float],
    *,
    base: str | None,
    task_type: str | None,
    fan_in_fan_out: bool,
) -> dict[str, Any]:
    """Return the config of an adapter whose modules have these ranks and scales.

    Modules are named in full, which every version of PEFT accepts as targets and as patterns.
    """
    alphas = {module: _plain(scales[module] * rank) for module, rank in ranks.items()}
    most = max(ranks, key=lambda module: ranks[module])
    alike = len(set(ranks.values())) == len(set(alphas.values())) == 1
    # Patterns match the end of a name, and the first match counts: longer names come first.
    patterned = [] if alike else sorted(ranks, key=len, reverse=True)
    return {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base,
        "r": ranks[most],
        "lora_alpha": alphas[most],
        "rank_pattern": {module: ranks[module] for module in patterned},
        "alpha_pattern": {module: alphas[module] for module in patterned},
        "target_modules": sorted(ranks),
        "fan_in_fan_out": fan_in_fan_out,
        "use_rslora": False,
        "use_dora": False,
        "bias": "none",
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
    }


def _lookup(patterns: Mapping[str, Number], module: str, default: Number) -> Number:
    """Return the value of the first pattern that matches the module's name, or its end after a dot."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _plain(number: float) -> float:
    return int(number) if number == int(number) else number
