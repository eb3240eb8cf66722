"""Parameter values of a recipe (scalars, gradients over the layers, lists of filters) and their evaluation."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

_LAYER = re.compile(r"^((?:[^.]*[^.\d][^.]*\.)*?)(\d+)(?:\.|$)")


def is_gradient(value: object) -> bool:
    """Whether `value` is a list of numbers, which is interpolated over the layers."""
    return isinstance(value, list) and bool(value) and all(isinstance(item, int | float) for item in value)


def filter_list(value: object) -> list[Mapping[str, Any]] | None:
    """Return a list of ``{value, filter}`` mappings, also for a single one; None if `value` is neither."""
    if isinstance(value, Mapping):
        return [value]
    if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        return value
    return None


def leaves(value: object) -> Iterator[object]:
    """Yield every plain value in `value`: those of all filters, and the corners of gradients."""
    filters = filter_list(value)
    if filters is not None:
        for item in filters:
            yield from leaves(item["value"])
    elif is_gradient(value):
        yield from value  # type: ignore[misc]
    else:
        yield value


def evaluate(value: Any, name: str, position: float) -> Any:
    """Evaluate a parameter value for one tensor; None if no filter matches.

    Args:
        value: scalar; list of numbers (piecewise linear in `position`) or of bools (the last one whose place in the
            list is not behind `position`); or ``{value, filter}`` or a list of such, where the first entry applies
            whose filter is a substring of `name` (``*`` or no filter: any name).
        name: name of the tensor.
        position: position of its layer, from 0.0 (first) to 1.0 (last).

    Examples:
        >>> evaluate([{"filter": "mlp", "value": [0.0, 1.0]}, {"value": 0.3}], "layers.3.mlp.up", 0.25)
        0.25
    """
    filters = filter_list(value)
    if filters is not None:
        for item in filters:
            pattern = item.get("filter")
            if pattern is None or pattern == "*" or pattern in name:
                return evaluate(item["value"], name, position)
        return None
    if is_gradient(value):
        scaled = position * (len(value) - 1)
        low = int(scaled)
        if all(isinstance(item, bool) for item in value):
            return value[low]
        high = min(len(value) - 1, low + 1)
        return value[low] + (scaled - low) * (value[high] - value[low])
    return value


def split_layer(name: str) -> tuple[str, int, str] | None:
    """Split a tensor's name at its layer index, the first whole number among the dot-separated parts.

    Returns:
        The text before the index, the index, and the text after it; None for a name without an index.

    Examples:
        >>> split_layer("model.layers.3.mlp.up")
        ('model.layers.', 3, 'mlp.up')
    """
    match = _LAYER.match(name)
    return None if match is None else (match[1], int(match[2]), name[match.end() :])


def layer_positions(names: Iterable[str], layers: int = 0, further: int = 0) -> dict[str, float]:
    """Map each tensor name to the position of its layer in [0, 1]: ``index / (layers - 1)``.

    The layer index is the first whole number among the dot-separated parts of the name; layers are counted per prefix.
    Names without an index (embeddings, final norm, head) have position 0, as in mergekit; a single layer has 1.

    Args:
        names: names of all tensors.
        layers: number of layers, if known from a config.
        further: number of layers behind them that predict further tokens; they have position 1.

    Examples:
        >>> layer_positions(["embed", "layers.0.w", "layers.1.w", "layers.2.w"])
        {'embed': 0.0, 'layers.0.w': 0.0, 'layers.1.w': 0.5, 'layers.2.w': 1.0}
    """
    found = {name: _LAYER.match(name) for name in names}
    last: dict[str, int] = {}
    for match in found.values():
        if match:
            last[match[1]] = max(last.get(match[1], 0), int(match[2]))
    last = {prefix: layers - 1 if layers <= index < layers + further else index for prefix, index in last.items()}
    return {
        name: 0.0 if match is None else (min(1.0, int(match[2]) / last[match[1]]) if last[match[1]] else 1.0)
        for name, match in found.items()
    }


def count_layers(names: Iterable[str]) -> int:
    """Return the number of layers: the largest layer index in the names plus one, or 0."""
    return max((found[1] + 1 for found in map(split_layer, names) if found), default=0)
