"""A file of JSON objects, one in each line, that survives crashes: journals are made of it.

Each line has a checksum of itself as its last key. A crash leaves at most an incomplete last line, which is cut off
when the file is opened for writing; damage anywhere else is an error.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..checkpoint import checksum
from ..errors import JournalError
from ..files import open_regular
from ..system import open_descriptor, sync, write_at


class Lines:
    """A file of lines that is open for more.

    Attributes:
        descriptor: of the file.
    """

    def __init__(self, file: Path, end: int) -> None:
        """Open a file, and cut it off at `end`: what follows was being written when its writer stopped."""
        self.descriptor = open_descriptor(file, os.O_WRONLY | os.O_CREAT)
        self._end = end
        os.ftruncate(self.descriptor, end)

    def append(self, objects: Sequence[Mapping[str, Any]]) -> None:
        """Add a line for each object; on return they are on disk."""
        lines, end = b"".join(map(as_line, objects)), self._end
        while lines:
            written = write_at(self.descriptor, lines, end)
            lines, end = lines[written:], end + written
        sync(self.descriptor)
        self._end = end

    def close(self) -> None:
        """Close the file, unless it is closed."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def read_lines(file: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the objects of a file, and the end of its last complete line; none if it does not exist.

    Raises:
        JournalError: the file cannot be read, or a line before the last is damaged.
    """
    try:
        with open_regular(file) as opened:
            text = opened.read()
    except FileNotFoundError:
        return [], 0
    except OSError as error:
        raise JournalError(f"{file}: cannot be read: {error.strerror or error}") from error
    objects: list[dict[str, Any]] = []
    end, damaged = 0, None
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        content = _parse(line)
        if content is None:
            damaged = damaged or number
        elif damaged:
            raise JournalError(f"{file}: line {damaged} is damaged; start over (--restart)")
        else:
            objects.append(content)
            end += len(line)
    return objects, end


def as_line(content: Mapping[str, Any]) -> bytes:
    """Return the line of an object."""
    text = json.dumps(content, separators=(",", ":"))
    return f'{text[:-1]},"line":"{checksum(text.encode())}"}}\n'.encode()


def _parse(line: bytes) -> dict[str, Any] | None:
    """Return the object of a line, or None if the line is incomplete or its checksum is wrong."""
    try:
        content = json.loads(line)
        del content["line"]
        return content if as_line(content) == line else None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
