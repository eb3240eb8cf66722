"""The journal of a merge: its fingerprint, and an entry for each tensor whose values are safely on disk.

Each line is a JSON object with a checksum of the line as its last key. The first line is the fingerprint of the merge
(`engine.fingerprint`), every other line a `Finished` tensor. Opening a journal cuts off an incomplete last line, which
a crash leaves; damage anywhere else is an error.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from ..checkpoint import checksum
from ..errors import JournalError
from ..files import open_regular
from ..methods import TensorReport


@dataclass(frozen=True)
class FinishedScales:
    """Scales of a weight in FP8, in their shard."""

    name: str
    shard: str
    offset: int
    nbytes: int
    dtype: str
    checksum: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Finished:
    """A tensor whose values are in their shard.

    Attributes:
        name: of the tensor.
        shard: file name of its shard.
        offset: of its first byte in that file.
        nbytes: size in bytes.
        dtype: of its values, e.g. ``bfloat16``; the shape is in the report.
        checksum: of its bytes (`checkpoint.checksum`).
        inputs: one checksum per input, the base first. That of an adapter covers both factors, and is empty if the
            adapter does not change the tensor. A tensor that keeps the base's value has the base's checksum only.
        report: its `TensorReport`, as JSON.
        scales: of a weight that was written in FP8.
    """

    name: str
    shard: str
    offset: int
    nbytes: int
    dtype: str
    checksum: str
    inputs: tuple[str, ...]
    report: dict[str, Any]
    scales: FinishedScales | None = None

    @property
    def stored(self) -> dict[str, tuple[tuple[object, ...], str]]:
        """Place, size, dtype and shape, and the checksum, of every tensor that was written, by name."""
        shape = as_report(self.report).shape
        found: dict[str, tuple[tuple[object, ...], str]]
        found = {self.name: ((self.shard, self.offset, self.nbytes, self.dtype, shape), self.checksum)}
        if (own := self.scales) is not None:
            found[own.name] = ((own.shard, own.offset, own.nbytes, own.dtype, own.shape), own.checksum)
        return found


class Journal:
    """A journal that is open for writing.

    Attributes:
        fingerprint: of the merge.
        finished: entries of finished tensors, by name.
    """

    def __init__(self, file: Path, fingerprint: Mapping[str, Any], finished: Mapping[str, Finished], end: int) -> None:
        self.file = file
        self.fingerprint = dict(fingerprint)
        self.finished = dict(finished)
        self._end = end
        self._descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        # Bytes after the last complete line were being written when the merge stopped.
        os.ftruncate(self._descriptor, end)

    @classmethod
    def create(cls, file: Path, fingerprint: Mapping[str, Any]) -> Journal:
        """Start a journal; its first line is on disk on return."""
        journal = cls(file, fingerprint, {}, 0)
        journal._append(_line(fingerprint))
        return journal

    @classmethod
    def open(cls, file: Path) -> Journal | None:
        """Open a journal for more entries, or return None if it has no complete first line.

        Raises:
            JournalError: the journal is damaged.
        """
        content = _read(file)
        return None if content is None else cls(file, *content)

    def append(self, finished: Sequence[Finished]) -> None:
        """Add tensors whose values are on disk; on return the entries are on disk, too."""
        self._append(b"".join(_line(asdict(entry)) for entry in finished))
        self.finished.update((entry.name, entry) for entry in finished)

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def _append(self, lines: bytes) -> None:
        end = self._end
        while lines:
            written = os.pwrite(self._descriptor, lines, end)
            lines, end = lines[written:], end + written
        os.fdatasync(self._descriptor)
        self._end = end


class _Models(BaseModel):
    """The part of a fingerprint that is read; the rest is only compared."""

    models: list[str] = Field(min_length=1)


_FINISHED = TypeAdapter(Finished)
_REPORT = TypeAdapter(TensorReport)


def as_report(data: Mapping[str, Any]) -> TensorReport:
    """Return the report of its JSON form.

    Raises:
        ValidationError: `data` is no report.
    """
    return _REPORT.validate_python(data)


def read_journal(file: Path) -> tuple[dict[str, Any], dict[str, Finished]]:
    """Read the fingerprint and the finished tensors of a journal.

    Raises:
        JournalError: the journal is missing or damaged.
    """
    content = _read(file)
    if content is None:
        raise JournalError(f"{file}: the journal is missing or empty; was this written by `rtsvm merge`?")
    return content[:2]


def _read(file: Path) -> tuple[dict[str, Any], dict[str, Finished], int] | None:
    """Return fingerprint, finished tensors and the end of the last complete line; None without a first line."""
    try:
        with open_regular(file) as opened:
            text = opened.read()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise JournalError(f"{file}: cannot be read: {error.strerror or error}") from error
    objects: list[dict[str, Any]] = []
    end, damaged = 0, None
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        content = _parse(line)
        if content is None:
            damaged = damaged or number
        elif damaged:
            raise JournalError(f"{file}: line {damaged} is damaged; merge again from the start (--restart)")
        else:
            objects.append(content)
            end += len(line)
    if not objects:
        return None
    fingerprint, *entries = objects
    try:
        _Models.model_validate(fingerprint)
        finished = [_FINISHED.validate_python(entry) for entry in entries]
        for entry in finished:
            as_report(entry.report)
    except ValidationError as error:
        wrong = error.errors()[0]
        reason = f"{'.'.join(map(str, wrong['loc']))}: {wrong['msg']}"
        raise JournalError(
            f"{file}: not a journal of this version ({reason}); merge again from the start (--restart)"
        ) from error
    return fingerprint, {entry.name: entry for entry in finished}, end


def _line(content: Mapping[str, Any]) -> bytes:
    text = json.dumps(content, separators=(",", ":"))
    return f'{text[:-1]},"line":"{checksum(text.encode())}"}}\n'.encode()


def _parse(line: bytes) -> dict[str, Any] | None:
    """Return the object of a line, or None if the line is incomplete or its checksum is wrong."""
    try:
        content = json.loads(line)
        del content["line"]
        return content if _line(content) == line else None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
