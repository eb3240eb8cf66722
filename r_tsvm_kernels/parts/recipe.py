"""Which recipes can be decomposed, and which recipes a folder of parts serves."""

from __future__ import annotations

from pathlib import Path

from ..config import MergeConfig
from ..errors import ConfigError
from ..methods import METHODS
from ..parts_folder import PartsFolder


def require_linear(config: MergeConfig) -> None:
    """Check that the merge of a recipe is linear in the weights.

    Raises:
        ConfigError: it is not, or it depends on more than models and parameters.
    """
    linear = config.method.linear
    if linear is None:
        names = ", ".join(name for name, method in METHODS.items() if method.linear is not None)
        raise ConfigError(
            f"{config.merge_method} cannot be decomposed, because its result is not linear in the weights, or needs no "
            f"decomposition; {names} can"
        )
    if (refusal := linear.refusal(config.options(max(1, len(config.models))))) is not None:
        raise ConfigError(f"{config.merge_method} cannot be decomposed with these parameters: {refusal}")
    if config.calibrate is not None:
        raise ConfigError("calibrate: a calibrated merge is not linear in the weights, and cannot be decomposed")
    if config.requantise:
        raise ConfigError("requantise: set it when merging from the parts, not for the decomposition")


def linear_parameters(config: MergeConfig) -> frozenset[str]:
    """Return the parameters that parts leave free; none if the recipe cannot be decomposed.

    Examples:
        >>> sorted(linear_parameters(MergeConfig("tsvm"))), sorted(linear_parameters(MergeConfig("ties")))
        (['alpha', 'weight'], [])
    """
    try:
        require_linear(config)
    except ConfigError:
        return frozenset()
    return frozenset({"weight", "alpha"})


def from_parts(config: MergeConfig, parts: str | Path) -> MergeConfig:
    """Return the recipe of the same merge from a folder of parts.

    Args:
        config: a recipe, which may have other weights and another alpha than the decomposed one.
        parts: the folder that `decompose_checkpoints` wrote.

    Raises:
        ConfigError: the parts are of another recipe; the message names what differs.
        CheckpointError: the folder is no folder of parts, or damaged.
    """
    check_recipe(config, PartsFolder.open(parts))
    return config.model_copy(update={"parts": str(parts)})


def check_recipe(config: MergeConfig, folder: PartsFolder) -> None:
    """Check that a recipe and the parts are of the same merge, whatever the weights and alpha.

    Raises:
        ConfigError: they are not; the message names what differs.
    """
    before = _without_weights(MergeConfig.from_dict(folder.recipe))
    now = _without_weights(config)
    for key in {**before, **now}:
        if before.get(key) != now.get(key):
            raise ConfigError(
                f"{folder.path}: the parts are of another recipe: {key} was {before.get(key)}, is {now.get(key)}; "
                "decompose again, or merge without parts"
            )


def _without_weights(config: MergeConfig) -> dict[str, object]:
    """Return what the parts of a recipe depend on."""
    schema, free = config.method.parameters.names(), {"weight", "alpha", "mode", "workspace", "solver"}
    models = [entry for entry in config.models if entry.model != config.base_model]
    parameters = {key: value for key, value in config.parameters.items() if schema[key] not in free}
    own = [{key: value for key, value in entry.parameters.items() if schema[key] not in free} for entry in models]
    kept = ("dtype", "include", "exclude", "router", "missing", "conv", "split", "vocabulary", "calibrate")
    return {
        "merge_method": config.method.name,
        "models": [entry.model for entry in models],
        "parameters": parameters,
        "parameters of models": own,
        **{key: getattr(config, key) for key in kept},
    }
