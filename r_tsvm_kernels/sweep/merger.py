"""Merge candidates, each into a folder that is used again, from parts where that saves decompositions."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from ..config import MergeConfig
from ..engine import Progress, merge_checkpoints
from .candidates import Candidate


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


class Merger:
    """Merges the candidates of a sweep.

    Attributes:
        decomposed: number of decompositions of this run.
    """

    def __init__(self, work: Path, resources: Resources, progress: Callable[[Progress], None] | None = None) -> None:
        self._work, self._resources, self._progress = work, resources, progress
        self.decomposed = 0

    def merge(self, candidate: Candidate, out: Path) -> None:
        """Merge a candidate into `out`, in place of what is there."""
        shutil.rmtree(out, ignore_errors=True)
        config = self._with_parts(candidate) if candidate.from_parts else candidate.config
        merge_checkpoints(config, out, restart=True, progress=self._progress, **self._resources.keywords())

    def forget(self, group: str) -> None:
        """Delete the parts of a group, if there are any."""
        shutil.rmtree(self._parts(group), ignore_errors=True)

    def _with_parts(self, candidate: Candidate) -> MergeConfig:
        """Return the recipe of a candidate that uses the parts of its group, which are made if they are missing."""
        raise NotImplementedError

    def _parts(self, group: str) -> Path:
        return self._work / f"parts-{sha256(group.encode()).hexdigest()[:16]}"


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
