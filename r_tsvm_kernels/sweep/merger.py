"""Merge candidates, each into a folder that is used again, from parts where several share them."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from ..config import MergeConfig
from ..engine import Progress, choose_device, decompose_checkpoints, merge_checkpoints
from ..engine.job import HOW_TO_RESUME
from ..engine.output import writing
from ..errors import ConvergenceError
from ..methods import Found, keeping
from ..parts import from_parts, linear_parameters
from .candidates import Candidate
from .folder import discard
from .updates import for_update, from_update

# Per element, factors of mean rank k take 2k operations for each task, and a matrix takes four bytes to read. A core of
# a CPU does some 25 operations in the time in which it reads a byte from the page cache.
_DENSE_ABOVE = 64
# Thresholds and norms that are kept after a merge, of 2.3 kB each. A search over a density needs none of them again.
_MOST_FOUND = 1 << 16
_HINT = re.compile(rf"(; )?\d+ of \d+ tensors are finished: {re.escape(HOW_TO_RESUME)}$")


@dataclass(frozen=True)
class Resources:
    """What merges may use, and how they write; see `merge_checkpoints`."""

    device: str = "auto"
    threads: int | None = None
    memory: str | int | None = None
    device_memory: str | int | None = None
    shard_size: str | int = "5GB"
    allow_pickle: bool = False

    def keywords(self) -> dict[str, Any]:
        """Return them as keywords of `merge_checkpoints`."""
        return asdict(self)

    def of_decomposition(self) -> dict[str, Any]:
        """Return them as keywords of `decompose_checkpoints`."""
        own = {name: value for name, value in asdict(self).items() if name != "shard_size"}
        return {**own, "dense_above": self.dense_above}

    @property
    def dense_above(self) -> int | None:
        """Mean rank above which parts are stored as matrices, see `decompose_checkpoints`.

        On a CPU, the products of factors take longer than reading matrices; a GPU forms them faster than it could read.
        """
        return _DENSE_ABOVE if choose_device(self.device).type == "cpu" else None


class Merger:
    """Merges the candidates of a sweep. Thresholds and norms of task vectors are kept from one to the next."""

    def __init__(self, work: Path, resources: Resources, progress: Callable[[Progress], None] | None = None) -> None:
        self._work, self._resources, self._progress = work, resources, progress and _apart(progress)
        self._found: Found = {}

    def merge(self, candidate: Candidate, out: Path) -> bool:
        """Merge a candidate into `out`, in place of what is there; return whether parts were used."""
        with writing(out):
            discard(out)
        if candidate.from_parts:
            with suppress(ConvergenceError):  # the parts cancel each other with these weights
                self._merge(self._shared(candidate), out)
                return True
        self._merge(candidate.config, out)
        return False

    def _merge(self, config: MergeConfig, out: Path) -> None:
        with _without_hint(), keeping(self._found):
            merge_checkpoints(config, out, restart=True, progress=self._progress, **self._resources.keywords())
        for oldest in list(self._found)[: max(0, len(self._found) - _MOST_FOUND)]:
            del self._found[oldest]

    def _shared(self, candidate: Candidate) -> MergeConfig:
        """Return the recipe from the parts or the update of a candidate's group, which are made if they are missing."""
        config, parts, resources = candidate.config, self._parts(candidate.group), self._resources
        linear = bool(linear_parameters(config))
        going_on: dict[str, Any] = {"resume": True, "progress": self._progress}
        if not parts.exists():
            with _without_hint():
                if linear:
                    decompose_checkpoints(config, parts, **going_on, **resources.of_decomposition())
                else:
                    with keeping(self._found):
                        merge_checkpoints(for_update(config), parts, **going_on, **resources.keywords())
        return from_parts(config, parts) if linear else from_update(config, parts)

    def forget(self, group: str) -> None:
        """Delete the parts of a group, if there are any."""
        discard(self._parts(group))

    def _parts(self, group: str) -> Path:
        stored = f"{group}, dense above {self._resources.dense_above}"
        return self._work / f"parts-{sha256(stored.encode()).hexdigest()[:16]}"


def _apart(progress: Callable[[Progress], None]) -> Callable[[Progress], None]:
    """Return a callback whose own merges, which may be of other models, use nothing that is kept here."""

    def call(state: Progress) -> None:
        with keeping(None):
            progress(state)

    return call


@contextmanager
def _without_hint() -> Iterator[None]:
    """Leave out of errors how to resume a merge: a sweep does it by itself."""
    try:
        yield
    except BaseException as error:
        if str(error).endswith(HOW_TO_RESUME):
            error.args = (_HINT.sub("", str(error)),)
        raise


@contextmanager
def notes_once() -> Iterator[None]:
    """Let each note of the plan of a merge pass once: those of all candidates are the same."""
    seen = set[str]()

    def is_new(record: logging.LogRecord) -> bool:
        text, before = record.getMessage(), len(seen)
        seen.add(text)
        return record.levelno < logging.WARNING or len(seen) > before

    logger = logging.getLogger(merge_checkpoints.__module__)
    logger.addFilter(is_new)
    try:
        yield
    finally:
        logger.removeFilter(is_new)
