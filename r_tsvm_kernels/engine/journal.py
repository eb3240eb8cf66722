"""The journal of a merge: its fingerprint, and an entry for each tensor whose values are safely on disk.

The first of its `Lines` is the fingerprint of the merge (`engine.fingerprint`), every other one a `Finished` tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from ..errors import JournalError
from ..methods import TensorReport
from .lines import Lines, read_lines


@dataclass(frozen=True)
class Stored:
    """A tensor in its shard.

    Attributes:
        name: in the output.
        shard: file name of its shard.
        offset: of its first byte in that file.
        nbytes: size in bytes.
        dtype: of its values, e.g. ``bfloat16``.
        shape: of the tensor.
        checksum: of its bytes (`checkpoint.checksum`).
    """

    name: str
    shard: str
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]
    checksum: str

    @property
    def place(self) -> tuple[object, ...]:
        """Everything but name and checksum."""
        return self.shard, self.offset, self.nbytes, self.dtype, self.shape


@dataclass(frozen=True)
class Finished:
    """A tensor whose values are in their shards.

    Attributes:
        name: of the tensor.
        stored: what was written: the merged tensor and, for a weight in FP8, its scales; or the parts of a tensor that
            was decomposed.
        inputs: one checksum per input, the base first. That of an adapter covers both factors, and is empty if the
            adapter does not change the tensor. A tensor that keeps the base's value has the base's checksum only.
        report: its `TensorReport`, as JSON.
    """

    name: str
    stored: tuple[Stored, ...]
    inputs: tuple[str, ...]
    report: dict[str, Any]

    @property
    def nbytes(self) -> int:
        """Bytes that were written."""
        return sum(own.nbytes for own in self.stored)


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
        self._lines = Lines(file, end)

    @classmethod
    def create(cls, file: Path, fingerprint: Mapping[str, Any]) -> Journal:
        """Start a journal; its first line is on disk on return."""
        journal = cls(file, fingerprint, {}, 0)
        journal._lines.append([fingerprint])
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
        self._lines.append([asdict(entry) for entry in finished])
        self.finished.update((entry.name, entry) for entry in finished)

    def close(self) -> None:
        """Close the file."""
        self._lines.close()


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
    objects, end = read_lines(file)
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
