"""Text for people: untrusted names and paths made printable, and short forms of values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def printable(text: object) -> str:
    r"""Return text with every character escaped that could confuse a terminal or an encoder.

    Control characters (escape sequences, line breaks, bells), marks that change the direction of writing, and bytes of
    a path that are not UTF-8 become escapes such as ``\x1b`` or ``\u202e``; other text is unchanged.

    Args:
        text: text, or any object, whose `str` is used.

    Examples:
        >>> printable("a\x1b[2Jb")
        'a\\x1b[2Jb'
    """
    return "".join(char if char.isprintable() else _escaped(char) for char in str(text))


def _escaped(char: str) -> str:
    code = ord(char)
    if 0xDC80 <= code <= 0xDCFF:  # Python's form of a byte of a path that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return char.encode("unicode_escape").decode()


def dtype_name(dtype: object) -> str:
    """Return ``bfloat16`` for `torch.bfloat16`, or for a text that names it.

    Examples:
        >>> dtype_name("torch.bfloat16")
        'bfloat16'
    """
    return str(dtype).removeprefix("torch.")


def shortened(value: object) -> str:
    """Return the `repr` of a value, at most 80 characters of it."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def kind_of(tensor: Any) -> str:
    """Return the shape and dtype of a tensor, such as ``512x512 float32``; of a scalar the dtype alone."""
    return " ".join(filter(None, ["x".join(map(str, tensor.shape)), dtype_name(tensor.dtype)]))


def listed(ranks: Sequence[int]) -> str:
    """Return the ranks of the tasks in a few characters.

    Examples:
        >>> listed([10, 10, 9]), listed(range(40))
        ('ranks 10/10/9', '40 ranks from 0 to 39')
    """
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if len(ranks) > 8:
        return f"{len(ranks)} ranks from {min(ranks)} to {max(ranks)}"
    return f"ranks {'/'.join(map(str, ranks))}"


def some(names: Sequence[str], most: int = 3) -> str:
    """Return the first names, and how many more there are.

    Examples:
        >>> some(["a", "b"]), some(["a", "b", "c", "d", "e"])
        ('a, b', 'a, b, c and 2 more')
    """
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
