"""Thresholds and norms of task vectors, kept from one merge of the same models for the next.

They depend neither on the weights nor on alpha, so the candidates of a sweep need the same ones again and again.
Outside of `keeping` nothing is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

T = TypeVar("T")
# By tensor, and by what was found of it. Values are a few numbers each.
Found = dict[tuple[Hashable, ...], Any]

_FOUND: ContextVar[Found | None] = ContextVar("found", default=None)
_TENSOR: ContextVar[str] = ContextVar("tensor", default="")


@contextmanager
def keeping(found: Found | None) -> Iterator[None]:
    """Let merges of the same models, on the same device, use what is in `found`, and add to it; None keeps nothing.

    Threads that a merge starts do so too.
    """
    token = _FOUND.set(found)
    try:
        yield
    finally:
        _FOUND.reset(token)


@contextmanager
def of_tensor(name: str) -> Iterator[None]:
    """Let what is recalled belong to this tensor of the models."""
    token = _TENSOR.set(name)
    try:
        yield
    finally:
        _TENSOR.reset(token)


def recalled(key: Hashable, find: Callable[[], T]) -> T:
    """Return what an earlier merge found of this tensor, or find it.

    Args:
        key: everything that it depends on, beside the tensors of the models.
        find: computes it.

    Examples:
        >>> found: Found = {}
        >>> with keeping(found), of_tensor("w"):
        ...     recalled("norm", lambda: 2.0), recalled("norm", lambda: 3.0)
        (2.0, 2.0)
    """
    found = _FOUND.get()
    if found is None:
        return find()
    place = (_TENSOR.get(), key)
    if place not in found:
        found[place] = find()
    value: T = found[place]
    return value
