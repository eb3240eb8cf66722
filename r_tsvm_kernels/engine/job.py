"""A merge as its driver sees it: what is left to do, where finished tensors go, and how it ends.

Engines differ in how they carry the work out. All of them take `MergeJob.pending`, put each tensor into
`MergeJob.shards` and call `MergeJob.record`; starting, resuming, committing and giving up are here.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress

import torch

from ..checkpoint import ShardLayout
from ..errors import JournalError, OutputUnfinishedError, ResumeRefusedError, RtsvmError
from ..plan import MergePlan
from ..text import dtype_name
from .fingerprint import difference, fingerprint
from .journal import Finished, Journal, as_report
from .output import Stage, writing
from .shards import Shards, layouts

# Finished tensors are put on disk together: so many bytes of them, or after so many seconds.
COMMIT_BYTES = 256 << 20
COMMIT_SECONDS = 2.0


class MergeJob:
    """A merge that is under way; made by `open_job`.

    Attributes:
        plan: what is to be done.
        device: where tensors are merged.
        measure_norms: see `merge_tensors`.
        shards: where they are written.
        finished: journal entries of the tensors that are done, by name.
        resumed: how many of them were done before this job began: those that the journal has, and that are still in
            the shards as the journal says.
    """

    measure_norms: bool | None = None

    def __init__(self, plan: MergePlan, device: torch.device, stage: Stage, shards: Shards, journal: Journal) -> None:
        self.plan = plan
        self.device = device
        self.stage = stage
        self.shards = shards
        self.finished = {
            name: entry for name, entry in journal.finished.items() if shards.checksum(name) == entry.checksum
        }
        self.resumed = len(self.finished)
        self._journal = journal
        self._batch: list[Finished] = []
        self._batch_bytes = 0
        self._committed = time.monotonic()
        self._lock = threading.Lock()

    @property
    def pending(self) -> list[str]:
        """Names of the tensors that are left to do, in the order of the plan."""
        return [name for name in self.plan.tensors if name not in self.finished]

    def record(self, entry: Finished) -> None:
        """Take note of a tensor that was written to its shard; it is journaled with the next `commit`, soon."""
        with self._lock:
            self.finished[entry.name] = entry
            self._batch.append(entry)
            self._batch_bytes += entry.nbytes
        if self._batch_bytes >= COMMIT_BYTES:
            self.commit()
        else:
            self.commit_if_due()

    def commit_if_due(self) -> None:
        """Commit if the last time was a while ago."""
        if time.monotonic() - self._committed >= COMMIT_SECONDS:
            self.commit()

    def commit(self) -> None:
        """Put the shards on disk, then the journal lines of the tensors recorded since the last time.

        Raises:
            DiskFullError, CheckpointError: the disk refused; these tensors are not journaled.
        """
        with self._lock:
            # Taken out first: after a failed sync the kernel forgets what it could not write, and a second try lies.
            batch, self._batch, self._batch_bytes = self._batch, [], 0
            if batch:
                self.shards.sync()
                self._journal.append(batch)
            self._committed = time.monotonic()


@contextmanager
def open_job(
    plan: MergePlan, stage: Stage, device: torch.device, *, resume: bool = False, restart: bool = False
) -> Iterator[MergeJob]:
    """Yield a job inside a locked stage; what is finished when the ``with`` block fails is kept for a resumption.

    Args:
        plan: what is to be done.
        stage: of the output.
        device: where tensors will be merged.
        resume: continue the merge that was stopped, if there is one.
        restart: throw away what such a merge has left.

    Raises:
        OutputUnfinishedError: there is such a merge, and neither `resume` nor `restart` was asked for.
        ResumeRefusedError: that merge is not this one; the message says what differs.
        JournalError: its journal is damaged.
        DiskFullError, CheckpointError: the disk refused.
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
                stage.remove()
            elif isinstance(error, RtsvmError) or not isinstance(error, Exception):
                done = f"{len(journal.finished)} of {len(plan.tensors)} tensors are finished"
                hint = f"{done}: run again with --resume (resume=True) to go on from there"
                if stage.published:
                    hint = f"{stage.out} is complete"
                error.args = (f"{error}; {hint}" if str(error) else hint,)
            raise


def _written(entry: Finished) -> tuple[object, ...]:
    """Return where a journal says that a tensor is, and what it says of its form."""
    return entry.shard, entry.offset, entry.nbytes, entry.dtype, as_report(entry.report).shape


def _laid_out(layout: ShardLayout, name: str) -> tuple[object, ...]:
    """Return the same of a tensor of a plan."""
    spec = layout.specs[name]
    return layout.file_name, layout.offsets[name], spec.nbytes, dtype_name(spec.dtype), spec.shape


def _check_entries(journal: Journal, plan: MergePlan) -> None:
    """Raise `JournalError` unless every tensor of a journal is one of the plan, of its form and at its place."""
    layout_of = {name: layout for layout in layouts(plan) for name in layout.specs}
    for name, entry in journal.finished.items():
        layout = layout_of.get(name)
        if layout is None or _written(entry) != _laid_out(layout, name):
            raise JournalError(
                f"{journal.file}: {name[:80]!a} is not in this merge, or not of that form at that place; start "
                "over with --restart (restart=True)"
            )


def _open_journal(stage: Stage, plan: MergePlan, device: torch.device, resume: bool, restart: bool) -> Journal:
    """Open the journal of the merge that was stopped, or make a new one in an empty stage."""
    identity = fingerprint(plan, device)
    stage.refuse_foreign()
    if restart:
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
            f"{stage.folder}: cannot be continued, because it is not the same merge ({what}); "
            "undo that, or start over with --restart (restart=True)"
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
