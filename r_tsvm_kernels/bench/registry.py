"""The list of benchmarks. Importing `r_tsvm_kernels.bench` fills it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from ..errors import ConfigError
from ..methods.base import nearest
from .case import Case, Inputs

# Decides how large the inputs may be: bound by memory, or by decompositions.
Kind = Literal["element-wise", "spectral"]


@dataclass(frozen=True)
class Benchmark:
    """A way to make cases.

    Attributes:
        name: of the op, the function or the merge method, with a variant behind a colon.
        kind: chooses the inputs.
        group: ``ops``, ``linalg`` or ``merges``.
        make: builds the case of an input.
    """

    name: str
    kind: Kind
    group: str
    make: Callable[[Inputs], Case]


REGISTRY: dict[str, Benchmark] = {}


def benchmark(name: str, group: str, kind: Kind = "element-wise") -> Callable[[Callable[[Inputs], Case]], None]:
    """Register the decorated function as the maker of cases of `name`."""

    def register(make: Callable[[Inputs], Case]) -> None:
        REGISTRY[name] = Benchmark(name, kind, group, make)

    return register


def chosen(patterns: Sequence[str]) -> list[Benchmark]:
    """Return the benchmarks of these names (patterns with *, all variants of a name, or a group); all for none.

    Raises:
        ConfigError: a name that fits nothing.
    """
    for pattern in patterns:
        if not any(_fits(entry, pattern) for entry in REGISTRY.values()):
            raise ConfigError(
                f"no benchmark is called {pattern!r}; did you mean {nearest(pattern, list(REGISTRY))!r}? "
                f"There are: {', '.join(REGISTRY)}"
            )
    return [entry for entry in REGISTRY.values() if not patterns or any(_fits(entry, pattern) for pattern in patterns)]


def _fits(entry: Benchmark, pattern: str) -> bool:
    return fnmatchcase(entry.name, pattern) or pattern in (entry.name.partition(":")[0], entry.group)
