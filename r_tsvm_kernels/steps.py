"""Recipes of several documents: named merges, whose outputs are models of others."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from .errors import ConfigError
from .files import read_regular
from .recipe_forms import MERGEKIT_RUNS_IT
from .safe_yaml import load_documents
from .text import shortened, some

MAX_RECIPE_BYTES = 1_000_000
# Names become folders.
_NAME = re.compile(r"[^\s/\\.][^/\\\x00-\x1f]{0,99}")
_REFERENCES = ("model", "base_model")


def read_documents(path: str | Path) -> list[Any]:
    """Read the documents of a recipe file.

    Raises:
        ConfigError: the file is missing, or is not YAML.
    """
    if not isinstance(path, str | Path):
        raise ConfigError(f"expected the path of a recipe, got {type(path).__name__}; from_dict takes a mapping")
    if "\n" in str(path):
        raise ConfigError(
            "expected the path of a recipe file, got its text; use MergeConfig.from_dict(yaml.safe_load(text))"
        )
    try:
        documents = load_documents(read_regular(path, MAX_RECIPE_BYTES).decode("utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the recipe {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    return documents


class Recipe(Protocol):
    """The part of a `MergeConfig` that is needed here."""

    def model_dump(self) -> dict[str, Any]:
        """Return the recipe as plain data."""


Config = TypeVar("Config", bound=Recipe)


def arranged(
    documents: Sequence[Mapping[str, Any]], make: Callable[[Mapping[str, Any]], Config]
) -> tuple[Config, dict[str, Config]]:
    """Make configs of parsed documents.

    Args:
        documents: the documents, with a ``name`` if others use them.
        make: makes a config of one.

    Returns:
        The config of the output, and those that come before it, by name and in order.

    Raises:
        ConfigError: two documents of one name; no recipe, or several, of the output; or a circle.
    """
    if not documents:
        raise ConfigError("a recipe is a mapping, got nothing")
    if len(documents) == 1:
        return make(documents[0]), {}
    configs: dict[str | None, Config] = {}
    for data in documents:
        name = name_of(data) if isinstance(data, Mapping) else None
        if name in configs:
            raise ConfigError(f"documents: two are called {name}" if name else "documents: two have no name")
        configs[name] = make(data)
    names = {name for name in configs if name is not None}
    *steps, last = in_order({name: used_names(config.model_dump(), names) for name, config in configs.items()})
    return configs[last], {str(name): configs[name] for name in steps}


def name_of(document: Mapping[str, Any]) -> str | None:
    """Return the name of a document, under which others refer to its output.

    Raises:
        ConfigError: it cannot be the name of a folder.
    """
    name = document.get("name")
    if name is not None and (not isinstance(name, str) or not _NAME.fullmatch(name)):
        raise ConfigError(
            f"name: expected text that can be the name of a folder, without slashes, got {shortened(name)}"
        )
    return name


def in_order(uses: Mapping[str | None, Collection[str]]) -> list[str | None]:
    """Return documents such that each comes after those it uses; the last is that of the output.

    Args:
        uses: by name, the names that a document uses; the name of at most one is None.

    Raises:
        ConfigError: they use each other in a circle; or there is no document without a name, and several that no other
            uses.

    Examples:
        >>> in_order({None: ["b"], "b": ["a"], "a": []})
        ['a', 'b', None]
    """
    ordered = list[str | None]()
    visiting: list[str | None] = []

    def visit(name: str | None) -> None:
        if name in ordered:
            return
        if name in visiting:
            raise ConfigError(f"documents: {some([str(n) for n in visiting], 8)} use each other in a circle")
        visiting.append(name)
        for other in uses[name]:
            visit(other)
        visiting.pop()
        ordered.append(name)

    for name in uses:
        visit(name)
    used = {other for names in uses.values() for other in names}
    last: list[str | None] = [None] if None in uses else [name for name in uses if name not in used]
    if len(last) != 1:
        raise ConfigError(
            f"documents: {some([str(name) for name in last], 8)} are used by no other; a recipe has one output: leave "
            f"out the name of its document, or split the recipe; {MERGEKIT_RUNS_IT.replace('yaml', 'multi')}"
        )
    return [*(name for name in ordered if name != last[0]), last[0]]


def references(data: object) -> Iterator[str]:
    """Yield every model that a recipe names, in its fields and in those of its models, slices and modules."""
    if isinstance(data, Mapping):
        for key, value in data.items():
            if key in _REFERENCES and isinstance(value, str):
                yield value
            elif key not in ("parameters", "steps"):
                yield from references(value)
    elif isinstance(data, list | tuple):
        for item in data:
            yield from references(item)


def used_names(data: object, names: Collection[str]) -> list[str]:
    """Return the names, among these, that a recipe refers to, alone or as ``name+adapter``."""
    found = dict.fromkeys(reference.partition("+")[0] for reference in references(data))
    return [name for name in found if name in names]


def placed(reference: str, places: Mapping[str, str], names: Collection[str] = ()) -> str:
    """Return a model with the path of a document's output in place of its name.

    Args:
        reference: a model, as a recipe names it.
        places: paths of outputs, by name.
        names: names of all documents.

    Raises:
        ConfigError: the output does not exist yet.

    Examples:
        >>> placed("first+lora", {"first": "/tmp/first"}), placed("org/model", {"first": "/tmp/first"})
        ('/tmp/first+lora', 'org/model')
    """
    name, plus, adapter = reference.partition("+")
    if name in names and name not in places:
        raise ConfigError(f"{name} is the output of another document of the recipe, which `rtsvm merge` merges first")
    return f"{places[name]}{plus}{adapter}" if name in places else reference
