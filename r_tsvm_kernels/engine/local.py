"""The engine of one machine: one thread reads, several merge and one writes, concurrently.

For a GPU, which merges faster than one thread reads and sums, the inputs of a tile are read by several threads.

    files -> reader -> [tiles that were read] -> workers -> [tiles that were merged] -> writer -> shards, journal

Tiles start in the order of the plan, so every input file is read from front to back, except that matrices which are
merged in one batch are read together, when the first of them is due. The `Schedule` bounds the bytes
between the stages. The calling thread only reports progress and waits. If it stops (Ctrl-C, an error in its callback),
so do the other threads; tiles merged by then are still written and journaled.
"""

from __future__ import annotations

import contextvars
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from ..checkpoint import Checksum
from ..linalg import use_cuda_graphs
from ..linalg.products.cuda_graph import Graphs
from ..methods import MergeResult, timed
from ..plan import MergePlan
from .device_memory import out_of_memory, within_budget
from .job import COMMIT_SECONDS
from .journal import Finished
from .scheduling import Schedule, TensorSchedule
from .shards import Shards
from .tiles import (
    Assembly,
    Tile,
    Values,
    check_parts,
    checksums_by_input,
    merge_group,
    merge_tile,
    read_tile,
    tiles_of,
    update_checksum,
)

_LOG = logging.getLogger(__name__)

# Seconds that a stopped merge waits for tiles that are being merged.
GRACE_SECONDS = 2.0

# Threads that read the inputs of a tile for a GPU.
READERS = 4

# The command line recognises by this name a thread that still works when everything else has ended.
THREAD_NAME = "rtsvm-merge"


class EngineJob(Protocol):
    """The part of a `MergeJob` that the engine needs; a worker of Ray has a group of tensors instead."""

    plan: MergePlan
    device: torch.device
    measure_norms: bool | None
    shards: Shards

    @property
    def pending(self) -> list[str]:
        """Names of the tensors to merge."""

    def record(self, entry: Finished) -> None:
        """Record a tensor that was written."""

    def commit_if_due(self) -> None:
        """Commit if the last commit was long ago."""

    def commit(self) -> None:
        """Sync recorded tensors to disk."""


def run_local(job: EngineJob, schedule: Schedule, tensor_done: Callable[[str], None]) -> None:
    """Merge all pending tensors; on return they are written and journaled.

    Args:
        job: the merge.
        schedule: workers, tiles and limits.
        tensor_done: called in this thread with the name of each tensor after it was written.

    Errors of reading, merging, writing and `tensor_done` are raised here.
    """
    pipeline = _Pipeline(job, schedule)
    threads_before = torch.get_num_threads()
    with within_budget(job.device, schedule):
        try:
            pipeline.start()
            while (name := pipeline.written.get()) is not None:
                tensor_done(name)
        finally:
            pipeline.stop()
            # Workers changed the default for new torch threads.
            torch.set_num_threads(threads_before)
    if pipeline.error is not None:
        raise pipeline.error


class _Budget:
    """A limit of the bytes in use at a time. A single size above the limit may use it alone."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._used = 0
        self._stopped = False
        self._alone = 0  # how many have, or wait for, all of it
        self._changed = threading.Condition()

    def take(self, size: int) -> bool:
        """Wait until `size` bytes are free; False if the pipeline stops instead."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._stopped or (not self._alone and (not self._used or self._used + size <= self._limit))
            )
            if not self._stopped:
                self._used += size
            return not self._stopped

    @contextmanager
    def alone(self, size: int) -> Iterator[bool]:
        """Let nobody in, and wait until only the caller's `size` bytes are in use; False if the pipeline stops."""
        with self._changed:
            self._alone += 1
            self._used -= size
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._stopped or not self._used)
            self._used += size
        try:
            yield not self._stopped
        finally:
            with self._changed:
                self._alone -= 1
                self._changed.notify_all()

    def give_back(self, size: int) -> None:
        with self._changed:
            self._used -= size
            self._changed.notify_all()

    def stop(self) -> None:
        """Wake all waiting threads."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()


@dataclass
class _Read:
    """A tile that was read: its inputs, the time of reading and, with the last tile of a tensor, all checksums."""

    tile: Tile
    inputs: list[Values]
    checksums: list[str]
    stages: dict[str, list[float]]


@dataclass
class _Merged:
    tile: Tile
    result: MergeResult
    checksums: list[str]


@dataclass
class _Output:
    """A tensor with some tiles written; tiles that finish out of order wait."""

    assembly: Assembly
    written: int = 0
    waiting: dict[int, _Merged] = field(default_factory=dict)


class _Pipeline:
    """The threads, and the queues and budgets between them. Budgets bound the queues."""

    def __init__(self, job: EngineJob, schedule: Schedule) -> None:
        self.job = job
        self.schedule = schedule
        self.error: BaseException | None = None
        self.written: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._on_gpu = job.device.type == "cuda"
        self._pending = set(job.pending)
        self._read: queue.SimpleQueue[list[_Read] | None] = queue.SimpleQueue()
        self._merged: queue.SimpleQueue[_Merged | None] = queue.SimpleQueue()
        self._inputs = _Budget(schedule.read_bytes)
        self._work = _Budget(schedule.work_bytes)
        self._device = _Budget(schedule.device_bytes)
        self._graphs: list[Graphs] = []
        self._turn = threading.Lock()
        self._stopping = threading.Event()
        self._readers = ThreadPoolExecutor(READERS if self._on_gpu else 1, THREAD_NAME)
        self._outputs: dict[str, _Output] = {}
        self._writing = self._thread(self._writer)
        self._working = [self._thread(self._reader), *(self._thread(self._worker) for _ in range(schedule.workers))]

    def start(self) -> None:
        for thread in (self._writing, *self._working):
            thread.start()

    def stop(self) -> None:
        """Start nothing more, and return when all merged tiles are written.

        Tiles that are being merged get `GRACE_SECONDS`. A decomposition may take minutes and cannot be interrupted: its
        thread ends after its tile, which is lost.
        """
        self._stop_early()
        deadline = time.monotonic() + GRACE_SECONDS
        try:
            for thread in self._working:
                if thread.ident is not None:  # an interrupt may precede its start
                    thread.join(max(0.0, deadline - time.monotonic()))
        finally:
            for _ in range(self.schedule.workers):
                self._read.put(None)
                self._merged.put(None)
            if self._writing.ident is not None:
                self._writing.join()

    def _thread(self, body: Callable[[], None]) -> threading.Thread:
        run = contextvars.copy_context().run
        return threading.Thread(target=run, args=(self._guarded, body), name=THREAD_NAME)

    def _stop_early(self) -> None:
        self._stopping.set()
        for budget in (self._inputs, self._work, self._device):
            budget.stop()

    def _guarded(self, body: Callable[[], None]) -> None:
        """Run the body of a thread; the first error stops the other threads."""
        try:
            body()
        except BaseException as error:
            self.error = self.error or error
            self._stop_early()
            self.written.put(None)  # wakes the calling thread

    # --- the reader

    def _each(self, function: Callable[..., Any], *lists: Iterable[Any]) -> list[Any]:
        """Call a function with the items of lists, for a GPU in several threads."""
        if not self._on_gpu:
            return list(map(function, *lists))
        calls = [
            self._readers.submit(contextvars.copy_context().run, function, *items) for items in zip(*lists, strict=True)
        ]
        wait(calls)  # nobody reads on after an error
        return [call.result() for call in calls]

    def _reader(self) -> None:
        try:
            for group in self.schedule.groups:
                # A batch of which some tensors are finished is merged again as a whole, for the same bits.
                if self._pending.isdisjoint(group):
                    continue
                checksums = {name: [Checksum() for _ in self.job.plan.tensors[name].parts] for name in group}
                for tiles in tiles_of(group, self.schedule.tensors):
                    if not self._inputs.take(self.schedule.needs(group).inputs):
                        return
                    self._read.put([self._read_tile(tile, checksums[tile.name]) for tile in tiles])
        finally:
            self._readers.shutdown(wait=False)
            for _ in range(self.schedule.workers):
                self._read.put(None)

    def _read_tile(self, tile: Tile, checksums: list[Checksum]) -> _Read:
        stages: dict[str, list[float]] = {}
        with timed(stages, "read"):
            inputs = read_tile(self.job.plan, tile, pin=self._on_gpu, each=self._each)
            self._each(update_checksum, checksums, inputs)
        found = checksums_by_input(self.job.plan, tile.name, checksums) if tile.is_last else []
        if found:
            check_parts(self.job.plan, tile.name, found)
        return _Read(tile, inputs, found, stages)

    # --- the workers

    def _worker(self) -> None:
        torch.set_num_threads(1)
        try:
            with self._own_stream(), self._own_graphs():
                while self._merge_next():
                    pass
        finally:
            self._merged.put(None)

    def _own_stream(self) -> AbstractContextManager[object]:
        """Return the CUDA stream of a worker, so that copies of one worker overlap with kernels of another."""
        return torch.cuda.stream(torch.cuda.Stream(self.job.device)) if self._on_gpu else nullcontext()  # type: ignore[no-untyped-call]

    @contextmanager
    def _own_graphs(self) -> Iterator[None]:
        """Let loops of products be CUDA graphs if there is memory for them."""
        limit = self.schedule.graph_bytes // self.schedule.workers
        if not limit:
            yield
            return
        with use_cuda_graphs(limit) as graphs:
            self._graphs.append(graphs)
            yield

    def _merge_next(self) -> bool:
        """Merge the next tile; False if there is none. A function, so that no tensor is held while waiting."""
        # One thread at a time, so that tiles start in order: a later tile must not take the memory that an earlier one
        # needs.
        with self._turn:
            reads = self._read.get()
            if reads is None:
                return False
            needs = self.schedule.needs([read.tile.name for read in reads])
            if not self._begin(needs):
                return False
        try:
            merged: list[_Merged] | None = self._merge(reads)
        except torch.cuda.OutOfMemoryError as error:
            _LOG.info("%s: out of memory on %s; again, alone (%s)", reads[0].tile.name, self.job.device, error)
            merged = None  # not again in here: the error holds on to tensors
        if merged is None and (merged := self._merge_alone(reads, needs)) is None:
            return False
        del reads
        written = sum(self.schedule.tensors[one.tile.name].output for one in merged)
        self._inputs.give_back(needs.inputs)
        self._work.give_back((needs.output if self._on_gpu else needs.work) - written)
        self._device.give_back(needs.inputs + needs.work)
        for one in merged:
            self._merged.put(one)
        return True

    def _merge(self, reads: list[_Read]) -> list[_Merged]:
        """Merge a tile, or a batch; return what is to be written."""
        plan, how = self.job.plan, (self.job.device, self.job.measure_norms)
        if len(reads) == 1:
            results = [merge_tile(plan, reads[0].tile, reads[0].inputs, *how)]
        else:
            results = merge_group(plan, [read.tile for read in reads], [read.inputs for read in reads], *how)
        merged = []
        for read, result in zip(reads, results, strict=True):
            result.report.stages |= read.stages
            if read.tile.name in self._pending:
                merged.append(_Merged(read.tile, result, read.checksums))
        return merged

    def _merge_alone(self, reads: list[_Read], needs: TensorSchedule) -> list[_Merged] | None:
        """Merge again what a GPU had no memory for, when nothing else is on it; None if the pipeline stops instead.

        Not in smaller batches, which would change the last bits.
        """
        with self._device.alone(needs.inputs + needs.work) as alone:
            if not alone:
                return None
            for graphs in self._graphs:  # nobody uses them now
                graphs.clear()
            torch.cuda.empty_cache()
            try:
                return self._merge(reads)
            except torch.cuda.OutOfMemoryError as error:
                names = [read.tile.name for read in reads]
                raise out_of_memory(self.job.plan, names, self.job.device, self.schedule, error) from error

    def _begin(self, needs: TensorSchedule) -> bool:
        """Wait for the memory to merge a tile; False if the pipeline stops instead."""
        if self._stopping.is_set():
            return False
        if self._on_gpu and not self._device.take(needs.inputs + needs.work):
            return False
        return self._work.take(needs.output if self._on_gpu else needs.work)

    # --- the writer

    def _writer(self) -> None:
        try:
            working = self.schedule.workers
            while working:
                try:
                    merged = self._merged.get(timeout=COMMIT_SECONDS)
                except queue.Empty:
                    self.job.commit_if_due()
                    continue
                if merged is None:
                    working -= 1
                else:
                    self._write_in_order(merged)
                    del merged
            self.job.commit()
        finally:
            self.written.put(None)

    def _write_in_order(self, merged: _Merged) -> None:
        """Write the tiles of a tensor in order, which its checksum needs."""
        name = merged.tile.name
        tensor = self.job.plan.tensors[name]
        if name not in self._outputs:
            self._outputs[name] = _Output(Assembly(self.job.plan.copied_from(name)))
        output = self._outputs[name]
        output.waiting[merged.tile.index] = merged
        while (following := output.waiting.pop(output.written, None)) is not None:
            output.assembly.write(tensor, following.tile, following.result, self.job.shards)
            output.written += 1
            self._work.give_back(self.schedule.tensors[name].output)
            if following.tile.is_last:
                del self._outputs[name]
                self.job.record(output.assembly.finish(tensor, following.checksums, self.job.shards))
                self.written.put(name)
