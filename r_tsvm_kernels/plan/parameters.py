"""The parameters of a merge as its recipe gives them, and as one tensor gets them after gradients and filters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..config import MergeConfig
from ..methods import MethodParameters
from ..parameters import filter_list, is_gradient


def common_parameters(config: MergeConfig) -> dict[str, Any]:
    """Return every parameter of the method for all models, as JSON: as the recipe writes it, or the default.

    Gradients and filters stay as they are written. Names are those of the method's fields, not their aliases.

    Examples:
        >>> common_parameters(MergeConfig("task_arithmetic", parameters={"lambda": [0.5, 1.0]}))
        {'weight': 1.0, 'alpha': [0.5, 1.0], 'normalize': False, 'int8_mask': False}
    """
    schema = config.method.parameters
    defaults = schema().model_dump(mode="json")
    found = {name: value[0] if schema.is_per_model(name) else value for name, value in defaults.items()}
    return found | _with_field_names(schema, config.parameters)


def model_parameters(config: MergeConfig) -> list[dict[str, Any]]:
    """Return the parameters that each model of a recipe sets for itself, as written, in the order of the models.

    Those of slices and modules are left out: a model may have others in each.
    """
    if not config.models:
        return [{} for _ in config.model_names]
    return [_with_field_names(config.method.parameters, entry.parameters) for entry in config.models]


def varying_parameters(config: MergeConfig, options: MethodParameters) -> dict[str, Any]:
    """Return those parameters of one tensor, as JSON, that a gradient or a filter sets.

    Args:
        config: the recipe.
        options: the parameters that `MergeConfig.options` evaluated for the tensor.

    Returns:
        By field name; a list of one value per model if models may set the parameter for themselves.
    """
    names = {name for name, value in _written(config) if is_gradient(value) or filter_list(value) is not None}
    return {name: value for name, value in options.model_dump(mode="json").items() if name in names}


def _written(config: MergeConfig) -> Iterator[tuple[str, Any]]:
    for parameters in (config.parameters, *(entry.parameters for entry in config.models)):
        yield from _with_field_names(config.method.parameters, parameters).items()


def _with_field_names(schema: type[MethodParameters], parameters: Mapping[str, Any]) -> dict[str, Any]:
    names = schema.names()
    return {names[key]: value for key, value in parameters.items()}
