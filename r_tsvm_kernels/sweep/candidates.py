"""The candidates of a sweep: their recipes, their order, and which of them share parts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..config import MergeConfig
from ..errors import ConfigError
from ..parts import linear_parameters
from .axes import MOST, Axis, with_values
from .journal import key
from .trial import described
from .updates import is_scaled


@dataclass(frozen=True)
class Candidate:
    """Values to try.

    Attributes:
        number: from 1, in the order in which candidates are tried.
        values: of each axis, by label.
        config: the recipe with these values.
        group: candidates with the same text differ only in parameters that parts leave free.
        from_parts: whether to merge it from the parts of its group.
    """

    number: int
    values: dict[str, Any]
    config: MergeConfig
    group: str
    from_parts: bool


def free_parameters(config: MergeConfig) -> frozenset[str]:
    """Return the parameters in which candidates that share their parts may differ: weights and alpha, or alpha alone.

    Examples:
        >>> [sorted(free_parameters(MergeConfig(method))) for method in ("tsvm", "ties", "linear")]
        [['alpha', 'weight'], ['alpha'], []]
    """
    if config.parts is not None or config.is_divided:
        return frozenset()
    return linear_parameters(config) or (frozenset({"alpha"}) if is_scaled(config) else frozenset())


def free_axes(config: MergeConfig, axes: Sequence[Axis]) -> list[Axis]:
    """Return the axes of parameters that parts leave free."""
    free = free_parameters(config)
    return [axis for axis in axes if axis.parameter in free]


def group_of(config: MergeConfig, axes: Sequence[Axis], values: Mapping[str, Any]) -> str:
    """Return a text that candidates share if they differ only in parameters that parts leave free."""
    free = {axis.label for axis in free_axes(config, axes)}
    return key({label: value for label, value in values.items() if label not in free})


def grid_candidates(config: MergeConfig, axes: Sequence[Axis]) -> list[Candidate]:
    """Return every combination of values, such that candidates which share parts follow each other.

    Raises:
        ConfigError: no axis, too many combinations, or values that contradict each other.
    """
    count = math.prod(len(axis.values) for axis in axes)
    if not axes or count > MOST:
        raise ConfigError(f"expected from 1 to {MOST} candidates, got {count if axes else 'no grid'}")
    groups: dict[str, list[tuple[dict[str, Any], MergeConfig]]] = {}
    for values in _product(axes):
        own = checked(config, axes, values)
        groups.setdefault(group_of(own, axes, values), []).append((values, own))
    return [
        Candidate(number, values, own, group, from_parts=len(groups[group]) > 1 and bool(free_parameters(own)))
        for number, (group, (values, own)) in enumerate(
            ((group, member) for group, members in groups.items() for member in members), 1
        )
    ]


def checked(config: MergeConfig, axes: Sequence[Axis], values: Mapping[str, Any]) -> MergeConfig:
    """Return the recipe with these values.

    Raises:
        ConfigError: they contradict each other; the message names them.
    """
    try:
        own = with_values(config, axes, values)
        listed = own.with_base_listed() if own.base_joins else own
        if listed.models:
            listed.options(len(listed.models))
    except ConfigError as error:
        raise ConfigError(f"{described(values)}: {error}") from None
    return own


def _product(axes: Sequence[Axis]) -> Iterator[dict[str, Any]]:
    labels = [axis.label for axis in axes]
    for values in itertools.product(*(axis.values for axis in axes)):
        yield dict(zip(labels, values, strict=True))
