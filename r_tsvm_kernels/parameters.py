"""Parameter values of a recipe: a scalar, a gradient over the layers, or a list of filters; and their evaluation."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

_LAYER = re.compile(r"^((?:[^.]*[^.\d][^.]*\.)*?)(\d+)(?:\.|$)")


def is_gradient(value: object) -> bool:
    """Whether `value` is a list of numbers, to be interpolated from the first layer to the last."""
    return isinstance(value, list) and bool(value) and all(isinstance(item, int | float) for item in value)


def filter_list(value: object) -> list[Mapping[str, Any]] | None:
    """Return the ``{value, filter}`` mappings of which `value` is a list, or the only one; None if it is neither."""
    if isinstance(value, Mapping):
        return [value]
    if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        return value
    return None


def leaves(value: object) -> Iterator[object]:
    """Yield every plain value that `value` may evaluate to (the corners of a gradient)."""
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
        value: scalar; list of numbers (piecewise linear in `position`); or ``{value, filter}`` or a list of such, of
            which the first counts whose filter is part of the tensor's name (``*`` or no filter: always).
        name: of the tensor.
        position: of its layer, from 0.0 (first) to 1.0 (last).
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
        high = min(len(value) - 1, low + 1)
        return value[low] + (scaled - low) * (value[high] - value[low])
    return value


def split_layer(name: str) -> tuple[str, int, str] | None:
    """Split a tensor's name at the index of its layer, the first whole number among its dot-separated parts.

    Returns:
        What comes before it, the index, and what comes after it; None for a name without one.
    """
    match = _LAYER.match(name)
    return None if match is None else (match[1], int(match[2]), name[match.end() :])


def layer_positions(names: Iterable[str]) -> dict[str, float]:
    """Map each tensor name to the position of its layer in [0, 1]: ``index / (layers - 1)``.

    The layer index is the first whole number among the dot-separated parts of the name, and the layers are counted
    per prefix. Names without one (embeddings, final norm, head) stand at 0, a single layer at 1.
    """
    found = {name: _LAYER.match(name) for name in names}
    last: dict[str, int] = {}
    for match in found.values():
        if match:
            last[match[1]] = max(last.get(match[1], 0), int(match[2]))
    return {
        name: 0.0 if match is None else (int(match[2]) / last[match[1]] if last[match[1]] else 1.0)
        for name, match in found.items()
    }


def count_layers(names: Iterable[str]) -> int:
    """Return the number of layers: one more than the largest layer index in the names, 0 without any."""
    return max((found[1] + 1 for found in map(split_layer, names) if found), default=0)
