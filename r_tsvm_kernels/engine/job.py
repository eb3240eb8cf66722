"""Start, resume, commit and stop a merge.

Engines differ in how they do the work. All of them take `MergeJob.pending`, write each tensor into `MergeJob.shards`
and call `MergeJob.record`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import ShardLayout
from ..dispatch import forced_backends, unusable
from ..errors import JournalError, OutputUnfinishedError, ResumeRefusedError, RtsvmError
from ..plan import MergePlan
from ..text import dtype_name
from .fingerprint import difference, fingerprint, kernels
from .journal import Finished, Journal, as_report, read_journal
from .output import Stage, writing
from .shards import Shards, layouts

_LOG = logging.getLogger(__name__)

# Finished tensors are synced together: at this many bytes, or after this many seconds.
COMMIT_BYTES = 256 << 20
COMMIT_SECONDS = 2.0
# At the end of the error that stopped a merge.
HOW_TO_RESUME = "run again with --resume (resume=True) to continue"


class MergeJob:
    """A running merge, made by `open_job`.

    Attributes:
        plan: the plan of the merge.
        device: the device that merges.
        measure_norms: see `merge_tensors`.
        shards: the shards of the output.
        finished: journal entries of finished tensors, by name.
        resumed: number of tensors that were finished before: those in the journal whose values are in the shards.
    """

    measure_norms: bool | None = None

    def __init__(self, plan: MergePlan, device: torch.device, stage: Stage, shards: Shards, journal: Journal) -> None:
        self.plan = plan
        self.device = device
        self.stage = stage
        self.shards = shards
        self.finished = {
            name: entry
            for name, entry in journal.finished.items()
            if all(shards.checksum(stored.name) == stored.checksum for stored in entry.stored)
        }
        self.resumed = len(self.finished)
        self._journal = journal
        self._batch: list[Finished] = []
        self._batch_bytes = 0
        self._committed = time.monotonic()
        self._lock = threading.Lock()

    @property
    def pending(self) -> list[str]:
        """Names of the tensors that are not finished, in the order of the plan."""
        return [name for name in self.plan.tensors if name not in self.finished]

    def close(self) -> None:
        """Close the shards and the journal: Windows moves no folder with open files."""
        self.shards.close()
        self._journal.close()

    def record(self, entry: Finished) -> None:
        """Record a tensor that was written to its shard; the next `commit` adds it to the journal."""
        with self._lock:
            self.finished[entry.name] = entry
            self._batch.append(entry)
            self._batch_bytes += entry.nbytes
        if self._batch_bytes >= COMMIT_BYTES:
            self.commit()
        else:
            self.commit_if_due()

    def commit_if_due(self) -> None:
        """Commit if the last commit is `COMMIT_SECONDS` old."""
        if time.monotonic() - self._committed >= COMMIT_SECONDS:
            self.commit()

    def commit(self) -> None:
        """Sync the shards, then add the tensors recorded since the last commit to the journal.

        Raises:
            DiskFullError, CheckpointError: writing failed; these tensors are not in the journal.
        """
        with self._lock:
            # Remove them first: after a failed sync the system drops the data that it could not write, and a second
            # sync would succeed.
            batch, self._batch, self._batch_bytes = self._batch, [], 0
            if batch:
                self.shards.sync()
                self._journal.append(batch)
            self._committed = time.monotonic()


def settled_kernels(plan: MergePlan, out: Path, device: torch.device, resume: bool) -> dict[str, str | None]:
    """Return the backends, by op, that a merge keeps to: those of the stopped merge if it is resumed.

    Raises:
        ResumeRefusedError: one of those cannot run here now.
    """
    chosen, stage = kernels(device, plan.config.method), Stage(out.parent.resolve() / out.name)
    before: dict[str, Any] = {}
    with suppress(JournalError):  # `open_job` says what is wrong with it
        before = read_journal(stage.journal)[0] if resume else {}
    if before.get("device") != device.type:
        return chosen
    for op in chosen.keys() & before["kernels"].keys() - forced_backends().keys():
        chosen[op] = before["kernels"][op]
        reason = unusable(op, chosen[op], device.type)
        if reason is not None:
            raise ResumeRefusedError(
                f"{stage.folder}: cannot be resumed, because {op} ran on the backend {chosen[op]} before, which cannot "
                f"run now: {reason}; make it run, or start over with --restart (restart=True)"
            )
    return chosen


@contextmanager
def open_job(
    plan: MergePlan, stage: Stage, device: torch.device, *, resume: bool = False, restart: bool = False
) -> Iterator[MergeJob]:
    """Yield a job inside a locked stage. If the ``with`` block fails, finished tensors are kept for resuming.

    Args:
        plan: the plan of the merge.
        stage: stage of the output.
        device: the device that merges.
        resume: continue a stopped merge, if there is one.
        restart: discard a stopped merge.

    Raises:
        OutputUnfinishedError: there is a stopped merge, and neither `resume` nor `restart` is set.
        ResumeRefusedError: the stopped merge differs from this one; the message says how.
        JournalError: the journal is damaged.
        DiskFullError, CheckpointError: writing failed.
    """
    with writing(stage.out):
        journal = _open_journal(stage, plan, device, resume, restart)
    with closing(journal):
        try:
            with writing(stage.out), closing(Shards(stage.folder, layouts(plan), create=True)) as shards:
                job = MergeJob(plan, device, stage, shards, journal)
                try:
                    yield job
                except BaseException:
                    with suppress(RtsvmError, OSError):  # the error that stopped the merge is the one to report
                        job.commit()
                    raise
        except BaseException as error:
            if not journal.finished:
                journal.close()
                stage.remove()
            elif isinstance(error, RtsvmError) or not isinstance(error, Exception):
                done = f"{len(journal.finished)} of {len(plan.tensors)} tensors are finished"
                hint = f"{done}: {HOW_TO_RESUME}"
                if stage.published:
                    hint = f"{stage.out} is complete"
                error.args = (f"{error}; {hint}" if str(error) else hint,)
            raise


def _laid_out(layout: ShardLayout, name: str) -> tuple[object, ...]:
    """Return place, size, dtype and shape of a tensor according to a plan."""
    spec = layout.specs[name]
    return layout.file_name, layout.offsets[name], spec.nbytes, dtype_name(spec.dtype), spec.shape


def _check_entries(journal: Journal, plan: MergePlan) -> None:
    """Raise `JournalError` unless every entry of a journal has the names, places, dtypes and shapes of the plan."""
    layout_of = {name: layout for layout in layouts(plan) for name in layout.specs}
    for entry in journal.finished.values():
        tensor = plan.tensors.get(entry.name)
        expected = {} if tensor is None else {name: _laid_out(layout_of[name], name) for name in tensor.outputs}
        written = {own.name: own.place for own in entry.stored}
        if tensor is None or written != expected or as_report(entry.report).shape != tensor.spec.shape:
            raise JournalError(
                f"{journal.file}: {entry.name[:80]!a} is not in this merge, or has another place, dtype or shape; "
                "start over with --restart (restart=True)"
            )


def _open_journal(stage: Stage, plan: MergePlan, device: torch.device, resume: bool, restart: bool) -> Journal:
    """Open the journal of a stopped merge, or make a new one in an empty stage."""
    identity = fingerprint(plan, device)
    stage.refuse_foreign()
    if restart:
        _LOG.info("restart: %s is discarded", stage.folder)
        stage.remove()
    journal = Journal.open(stage.journal)
    if journal is not None and journal.finished:
        what = difference(journal.fingerprint, identity)
        if resume and what is None:
            try:
                _check_entries(journal, plan)
            except BaseException:
                journal.close()
                raise
            return journal
        journal.close()
        if not resume:
            raise OutputUnfinishedError(
                f"{stage.folder}: a merge into {stage.out} was stopped after {len(journal.finished)} tensors; "
                "--resume (resume=True) continues it, --restart (restart=True) starts over"
            )
        raise ResumeRefusedError(
            f"{stage.folder}: cannot be resumed, because the merge has changed ({what}); "
            "undo the change, or start over with --restart (restart=True)"
        )
    if journal is not None:
        journal.close()
    stage.remove()
    stage.folder.mkdir()
    try:
        return Journal.create(stage.journal, identity)
    except BaseException:
        stage.remove()
        raise
