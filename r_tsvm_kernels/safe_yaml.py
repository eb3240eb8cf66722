"""Parse untrusted YAML: bounded in size and depth, no cycles, no duplicate keys."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import yaml

MAX_CHARACTERS = 500_000
MAX_DEPTH = 32
# Nodes, including those that aliases repeat: a few lines of nested aliases can stand for more than memory holds.
MAX_NODES = 50_000


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with bounds; numbers such as 1e-4 are numbers, as in YAML 1.2."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._nodes = 0
        self._sizes: dict[int, int] = {}  # of finished nodes, by identity

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
        is_alias = self.check_event(yaml.AliasEvent)
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise _refusal(f"nested deeper than {MAX_DEPTH} levels", mark)
        before = self._nodes
        node: yaml.Node | None = super().compose_node(parent, index)
        if is_alias:
            if id(node) not in self._sizes:
                raise _refusal("an alias inside what it stands for", mark)
            self._nodes += self._sizes[id(node)]
        else:
            self._nodes += 1
            self._sizes[id(node)] = self._nodes - before
        if self._nodes > MAX_NODES:
            raise _refusal(f"more than {MAX_NODES} values, aliases written out", mark)
        if isinstance(node, yaml.MappingNode) and not is_alias:
            _refuse_duplicates(node)
        self._depth -= 1
        return node


# YAML 1.1, which PyYAML reads, wants a dot and a sign in these.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def load_documents(text: str) -> list[Any]:
    r"""Parse all documents of a text; those that are empty are left out.

    Args:
        text: the documents, between lines of ``---``. The bounds hold for all of them together.

    Raises:
        ValueError: as `load_yaml`.

    Examples:
        >>> load_documents("a: 1\n---\nb: 2")
        [{'a': 1}, {'b': 2}]
    """
    return [found for found in _parsed(text, lambda: list(yaml.load_all(text, _Loader))) if found is not None]


def load_yaml(text: str) -> Any:
    """Parse one YAML document.

    Args:
        text: the document; only mappings, lists and plain values can result from it.

    Raises:
        ValueError: not YAML, a duplicate key, or beyond the bounds; the message is one line and names the place.

    Examples:
        >>> load_yaml("weight: 1e-1")
        {'weight': 0.1}
    """
    return _parsed(text, lambda: yaml.load(text, _Loader))  # a safe loader


def _parsed(text: str, parse: Callable[[], Any]) -> Any:
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"longer than {MAX_CHARACTERS} characters")
    try:
        return parse()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
        raise ValueError(f"{place}{error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    # Values that look like numbers, dates or bytes and are not, such as 2026-13-45 or `!!int x`.
    except (ValueError, TypeError, AttributeError, LookupError, OverflowError) as error:
        raise ValueError(f"a value that cannot be read: {error}") from error


def _refuse_duplicates(node: yaml.MappingNode) -> None:
    seen = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode) and key.value != "<<":
            if (key.tag, key.value) in seen:
                raise _refusal(f"the key {key.value[:40]!a} is given twice", key.start_mark)
            seen.add((key.tag, key.value))


def _refusal(problem: str, mark: yaml.Mark) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)
