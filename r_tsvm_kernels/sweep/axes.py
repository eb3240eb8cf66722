"""The parameters that a sweep varies: ``alpha=0.4:1.6:0.2``, ``weight.math=0.5,1``, ``rank=full,sparsity``."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

from ..config import MergeConfig
from ..entries import every_entry
from ..errors import ConfigError
from ..methods import MethodParameters, did_you_mean
from ..ops._checks import plain_values
from ..plan import tasks_of
from ..safe_yaml import load_yaml
from ..text import shortened, some

# The most values of one parameter, and the most candidates of a grid.
MOST = 10_000

_NUMBER = r"\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*"
_STEPS = re.compile(f"{_NUMBER}:{_NUMBER}:{_NUMBER}")
_RANGE = re.compile(f"{_NUMBER}:{_NUMBER}(?::\\s*(log)\\s*)?")
_ONLY_NUMBERS = re.compile(r"[-+.\deE\s:]*:[-+.\deE\s:]*")


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included, that a search chooses from.

    Attributes:
        low: the smallest.
        high: the largest.
        log: whether the search looks at their logarithms.
        whole: whether only whole numbers are meant.
    """

    low: float
    high: float
    log: bool = False
    whole: bool = False


@dataclass(frozen=True)
class Axis:
    """One parameter that is varied.

    Attributes:
        label: name in tables and in the journal, such as ``alpha`` or ``weight.math``.
        parameter: field of the method's parameters.
        key: the parameter as it was written, which may be an alias.
        model: index of the model that the values are for; None: for all models.
        values: the values to try; empty if there is a range.
        range: the range to search.
    """

    label: str
    parameter: str
    key: str
    model: int | None
    values: tuple[Any, ...] = ()
    range: Range | None = None


def grid_axis(config: MergeConfig, name: str, values: str | Sequence[Any]) -> Axis:
    """Return the axis of a parameter with these values.

    Args:
        config: the recipe.
        name: a parameter of the method, or ``PARAMETER.MODEL`` for one model: the last part of its path, or the
            beginning of it.
        values: ``start:stop:step``, values separated by commas in the form that recipes have, or a sequence.

    Raises:
        ConfigError: an unknown parameter or model (the message names the nearest), or a value that the method refuses.

    Examples:
        >>> grid_axis(MergeConfig("tsvm"), "alpha", "0.4:1:0.2").values
        (0.4, 0.6, 0.8, 1.0)
    """
    axis = _named(config, name)
    found = _values_of(name, values) if isinstance(values, str) else tuple(plain_values(value) for value in values)
    if not found:
        raise ConfigError(f"{name}: no values")
    seen = set[str]()
    for value in found:
        if value is None:
            raise ConfigError(f"{name}: expected a value, got nothing")
        same = json.dumps(float(value) if isinstance(value, int) and not isinstance(value, bool) else value)
        if same in seen:
            raise ConfigError(f"{name}: {shortened(value)} is given twice")
        seen.add(same)
        with_values(config, [axis], {axis.label: value})
    return Axis(axis.label, axis.parameter, axis.key, axis.model, found)


def range_axis(config: MergeConfig, name: str, bounds: str | Sequence[float]) -> Axis:
    """Return the axis of a parameter that is searched between ``low:high``, or ``low:high:log``.

    Raises:
        ConfigError: as `grid_axis`; or the bounds are not two different numbers, both positive for a logarithm.

    Examples:
        >>> range_axis(MergeConfig("tsvm"), "alpha", "0.2:2").range
        Range(low=0.2, high=2.0, log=False, whole=False)
    """
    axis = _named(config, name)
    text = bounds if isinstance(bounds, str) else ":".join(map(str, bounds))
    match = _RANGE.fullmatch(text)
    if match is None:
        raise ConfigError(f"{name}: a range is LOW:HIGH or LOW:HIGH:log, got {text!r}")
    whole = config.method.parameters.model_fields[axis.parameter].annotation is int
    low, high, log = float(match[1]), float(match[2]), match[3] is not None
    if not low < high or (log and low <= 0) or (whole and not (low.is_integer() and high.is_integer())):
        needs = ", whole numbers" * whole + ", both positive" * log
        raise ConfigError(f"{name}: expected LOW below HIGH{needs}, got {text!r}")
    span = Range(int(low) if whole else low, int(high) if whole else high, log, whole)
    for bound in (span.low, span.high):
        with_values(config, [axis], {axis.label: bound})
    return Axis(axis.label, axis.parameter, axis.key, axis.model, range=span)


def check_axes(axes: Sequence[Axis]) -> None:
    """Require that each parameter is varied once.

    Raises:
        ConfigError: a parameter of the same model is given twice.
    """
    seen: dict[tuple[str, int | None], Axis] = {}
    for axis in axes:
        first = seen.setdefault((axis.parameter, axis.model), axis)
        if first is not axis:
            names = " and ".join(dict.fromkeys((first.label, axis.label)))
            raise ConfigError(f"{names}: given twice; write all values of a parameter in one place")


def check_divided(config: MergeConfig, axes: Sequence[Axis]) -> None:
    """Require that slices and modules leave to the recipe what is varied.

    Raises:
        ConfigError: one of them has its own value, which would take precedence.
    """
    slices = [*config.slices, *(part for module in config.modules.values() for part in module.slices)]
    places = [part.parameters for part in slices] + [module.parameters for module in config.modules.values()]
    places += [entry.parameters for entry in every_entry((), config.slices, config.modules.values())]
    names = config.method.parameters.names()
    own = {names.get(key) for parameters in places for key in parameters}
    for axis in axes:
        if axis.parameter in own:
            raise ConfigError(f"{axis.label}: a slice or module of the recipe has its own value, which would stay")


def with_values(config: MergeConfig, axes: Sequence[Axis], values: Mapping[str, Any]) -> MergeConfig:
    """Return the recipe of a candidate.

    A value for all models replaces the values that models have of their own; a value for one model comes after that.

    Args:
        config: the recipe of the sweep.
        axes: what is varied.
        values: a value for each axis, by label.

    Raises:
        ConfigError: the method refuses a value.
    """
    common, models = dict(config.parameters), [dict(entry.parameters) for entry in config.models]
    schema = config.method.parameters
    for axis in sorted(axes, key=lambda axis: axis.model is not None):
        for own in models if axis.model is None else [models[axis.model]]:
            _drop(own, schema, axis.parameter)
        target = common if axis.model is None else models[axis.model]
        _drop(target, schema, axis.parameter)
        target[axis.key] = values[axis.label]
    fields: dict[str, Any] = {name: getattr(config, name) for name in type(config).model_fields}
    entries = [entry.model_copy(update={"parameters": own}) for entry, own in zip(config.models, models, strict=True)]
    return MergeConfig(**fields | {"parameters": common, "models": tuple(entries)})


def _drop(parameters: dict[str, Any], schema: type[MethodParameters], field: str) -> None:
    for key in [key for key in parameters if schema.names()[key] == field]:
        del parameters[key]


def _named(config: MergeConfig, name: str) -> Axis:
    """Return an axis without values."""
    key, _, model = name.strip().partition(".")
    schema, method = config.method.parameters, config.merge_method
    if key not in schema.names():
        known = f"parameters of {method}: {', '.join(sorted(schema.names()))}"
        kind = "is a recipe field, not a parameter" if key in MergeConfig.model_fields else "unknown parameter"
        raise ConfigError(f"{name}: {kind}; {did_you_mean(key, schema.names(), known)}")
    field = schema.names()[key]
    if not model:
        return Axis(key, field, key, None)
    if not schema.is_per_model(field):
        raise ConfigError(f"{name}: {key} is one value for all models; write {key}=...")
    index, shown = _find_model(config, name, model)
    return Axis(f"{key}.{shown}", field, key, index)


def _find_model(config: MergeConfig, name: str, wanted: str) -> tuple[int, str]:
    """Return the index of a model and its name; the names are those of `rtsvm merge --weight NAME=W`."""
    names = [task.name for task in tasks_of(config)]
    paths = [str(entry.model) for entry in config.models]
    for known in (names, paths):
        if known.count(wanted) == 1:
            return known.index(wanted), names[known.index(wanted)]
    found = [index for index, own in enumerate(names) if own.startswith(wanted)]
    if len(found) == 1:
        return found[0], names[found[0]]
    if found:
        raise ConfigError(f"{name}: several models begin so: {some([names[index] for index in found], 8)}")
    listed = f"models: {', '.join(names) or 'none'}"
    raise ConfigError(f"{name}: no model {wanted!r}; {did_you_mean(wanted, names, listed)}")


def _values_of(name: str, text: str) -> tuple[Any, ...]:
    match = _STEPS.fullmatch(text)
    if match is not None:
        return _steps(name, text, match.groups())
    if _ONLY_NUMBERS.fullmatch(text):  # YAML 1.1 would read 1:30 as 90
        raise ConfigError(f"{name}: a range is START:STOP:STEP, got {text!r}")
    try:
        found = load_yaml(f"[{text}]")
    except ValueError as error:
        raise ConfigError(f"{name}: {text!r} is not a list of values: {error}") from error
    if not isinstance(found, list):
        raise ConfigError(f"{name}: {text!r} is not a list of values")
    return tuple(found)


def _steps(name: str, text: str, parts: Sequence[str]) -> tuple[float, ...]:
    """Return the numbers of a range, exactly as they would be written; whole numbers if all its parts are."""
    start, stop, step = map(Decimal, parts)
    if step == 0 or (stop - start) / step < 0:
        raise ConfigError(f"{name}: {text!r} never reaches its end; a range is START:STOP:STEP")
    try:
        count = int((stop - start) // step) + 1
    except InvalidOperation:  # more digits than a Decimal has
        count = MOST + 1
    if count > MOST:
        raise ConfigError(f"{name}: {text!r} has more than {MOST} values")
    whole = all(part.lstrip("+-").isdecimal() for part in parts)
    return tuple(int(start + i * step) if whole else float(start + i * step) for i in range(count))
