"""The engine of several GPUs and machines: Ray runs the local engine on groups of tensors, wherever there is room.

    driver: groups of tensors -> Ray -> workers: read, merge, write into the shards -> driver: journal

Inputs and output lie on a file system that all machines share under the same paths. A worker writes its tensors to
their places in the shards and syncs them; what it reports back is small. A group whose worker was lost is merged again
by another one: the same bytes at the same place, so it does no harm if the first one was still writing.
"""

from __future__ import annotations

import logging
import os
import platform
import signal
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import BackendUnavailableError, ClusterError, DeviceError, MemoryBudgetError, RtsvmError
from ..plan import MergePlan
from ..sizes import format_size
from .fingerprint import software
from .job import COMMIT_SECONDS, MergeJob
from .journal import Finished
from .local import run_local
from .scheduling import Schedule
from .shards import Shards, layouts

# Inputs of a group: large enough that starting a task does not count, small enough that little is lost with a worker.
GROUP_BYTES = 512 << 20
# Groups per task slot, so that none waits long for the last one.
GROUPS_PER_SLOT = 4
# How often a group is tried again after its worker was lost.
RETRIES = 3
# Tensors do not travel through Ray's object store, so a Ray of our own gets about the smallest it allows.
OBJECT_STORE_BYTES = 100 << 20
# How long to wait for an answer of a cluster.
CONNECT_SECONDS = 10.0
# How long to wait for workers that were told to end.
GOODBYE_SECONDS = 10.0
# A process that has begun to use a GPU cannot be shown another one, so Ray would start a new process for every task:
# seconds each. Instead every worker sees all GPUs of its machine, and takes the one that Ray gives the task.
GPU_OPTIONS = {
    "num_gpus": 1,
    "max_calls": 0,
    "runtime_env": {"env_vars": {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}},
}


@dataclass(frozen=True)
class _Order:
    """What all groups of a merge have in common, sent to the workers once."""

    plan: MergePlan
    schedule: Schedule
    stage: Path
    device_type: str
    measure_norms: bool | None
    software: dict[str, Any]
    folder: Path


def run_ray(
    job: MergeJob,
    schedule: Schedule,
    tensor_done: Callable[[str], None],
    *,
    tasks: int | None = None,
    address: str | None = None,
) -> None:
    """Merge everything that is pending, and return when it is written and journaled.

    Without an address, a connection to Ray that the program has already is used; else one is made, and closed again.

    Args:
        job: what is to be done, and where the results go.
        schedule: of one task: its threads, tiles and limits.
        tensor_done: called in this thread with the name of each tensor that is written.
        tasks: most tasks at a time; None means as many as the cluster has room for.
        address: of a running cluster, e.g. ``10.0.0.1:6379``; None starts Ray on this machine alone.

    Raises:
        BackendUnavailableError: Ray is not installed.
        ClusterError: the cluster cannot be reached, its machines differ in software, or workers were lost repeatedly.
        DeviceError, MemoryBudgetError: no machine has the GPU or the memory that a task takes.
        Whatever reading, merging, writing or `tensor_done` raises.
    """
    ray = _import_ray()
    # A signal breaks into the main thread, which therefore must not be the one that writes the journal.
    with _signals_as_raised(), _connected(ray, address, tasks), ThreadPoolExecutor(1) as journal:
        options = _task_options(ray, job, schedule)
        slots = tasks or max(1, int(ray.cluster_resources().get("GPU" if "num_gpus" in options else "CPU", 1)))
        waiting = deque(_groups(job, slots))
        most = tasks or len(waiting)  # Ray queues what there is no room for
        task = ray.remote(**options)(merge_group)
        here = (job.device.type, job.measure_norms, software(job.device), Path.cwd())
        order = ray.put(_Order(job.plan, schedule, job.stage.folder, *here))
        running: list[Any] = []
        try:
            while waiting or running:
                while waiting and len(running) < most:
                    running.append(task.remote(order, waiting.popleft()))
                done, running = ray.wait(running, timeout=COMMIT_SECONDS)
                for result in done:
                    for entry in _finished(ray, result):
                        journal.submit(job.record, entry).result()
                        tensor_done(entry.name)
                journal.submit(job.commit_if_due).result()
            journal.submit(job.commit).result()
        finally:
            _stop(ray, running)


def merge_group(order: _Order, names: list[str]) -> list[Finished]:
    """Merge some tensors from their files into their shards; runs in a worker of Ray.

    Raises:
        ClusterError: this machine would compute other bytes than the driver's.
        Whatever reading, merging and writing raises.
    """
    device = own_gpu() if order.device_type == "cuda" else torch.device("cpu")
    here = software(device)
    if here != order.software:
        raise ClusterError(
            f"{platform.node()}: its software differs from the driver's, {here} here and {order.software} there; "
            "install the same versions everywhere, or start Ray on this machine alone"
        )
    with suppress(OSError):  # only paths that are not absolute need it
        os.chdir(order.folder)
    group = [layout for layout in layouts(order.plan) if not layout.specs.keys().isdisjoint(names)]
    # Opened anew for each group: a worker that outlives its driver must not find the shards of the next one.
    with closing(Shards(order.stage, group)) as shards:
        part = _Part(order.plan, device, order.measure_norms, shards, names)
        run_local(part, order.schedule, lambda name: None)
    if order.device_type == "cuda":
        torch.cuda.empty_cache()  # the next task of this process may be given another GPU
    return part.finished


def own_gpu() -> torch.device:
    """Return the GPU that Ray has given to the task that calls this."""
    gpu = str(_import_ray().get_gpu_ids()[0])
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return torch.device("cuda", visible.split(",").index(gpu) if visible else int(gpu))


class _Part:
    """A group as the local engine sees it: a job whose journal is kept by somebody else."""

    def __init__(
        self, plan: MergePlan, device: torch.device, measure_norms: bool | None, shards: Shards, names: list[str]
    ) -> None:
        self.plan = plan
        self.device = device
        self.measure_norms = measure_norms
        self.shards = shards
        self.pending = names
        self.finished: list[Finished] = []

    def record(self, entry: Finished) -> None:
        self.finished.append(entry)

    def commit_if_due(self) -> None:
        pass

    def commit(self) -> None:
        self.shards.sync()


def _import_ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise BackendUnavailableError(
            "the ray engine needs Ray, which is not installed; run: pip install ray, or use the local engine"
        ) from error
    return ray


@contextmanager
def _signals_as_raised() -> Iterator[None]:
    """Raise what a signal handler raised, where the compiled part of Ray makes a SystemError of it."""
    try:
        yield
    except SystemError as error:
        if error.__cause__ is None:
            raise
        raise error.__cause__ from None


@contextmanager
def _connected(ray: Any, address: str | None, tasks: int | None) -> Iterator[None]:
    """Connect to Ray, or start it, for the ``with`` block."""
    if ray.is_initialized() and address is None:
        yield
        return
    if address:
        _require_listener(address)
    # Ray reports its usage to its makers unless it is told not to, and talks a lot.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    logging.getLogger("ray").setLevel(logging.ERROR)
    own = {} if address else {"num_cpus": tasks, "include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
    # Ray takes SIGTERM for itself; whoever called us knows better what to do with it.
    on_main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address or "local", log_to_driver=False, logging_level=logging.ERROR, **own)
    except (ray.exceptions.RayError, ConnectionError, RuntimeError, ValueError) as error:
        raise ClusterError(f"no connection to Ray at {address or 'this machine'}: {error}") from error
    finally:
        if on_main_thread:
            signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        ray.shutdown()


def _require_listener(address: str) -> None:
    """Refuse an address where nobody answers; Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if not port.isdecimal():
        return  # "auto"
    try:
        socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ClusterError(
            f"no Ray cluster answers at {address} ({error}); `ray start --head` begins one and tells its address"
        ) from error


def _task_options(ray: Any, job: MergeJob, schedule: Schedule) -> dict[str, Any]:
    """Return what Ray has to know of a task, after a look at whether any machine of the cluster can run it."""
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    options: dict[str, Any] = {"num_cpus": 1, "memory": schedule.peak_host_bytes, "max_retries": RETRIES}
    if str(job.device) not in ("cpu", "cuda"):
        raise DeviceError(f"Ray chooses the GPU itself, got device {job.device}; use --device cuda")
    if job.device.type == "cuda":
        options |= GPU_OPTIONS
        machines = [resources for resources in machines if resources.get("GPU", 0) >= 1]
        if not machines:
            raise DeviceError("no machine of the Ray cluster has a GPU; use --device cpu")
    largest = max((int(resources.get("memory", 0)) for resources in machines), default=0)
    if largest < schedule.peak_host_bytes:
        raise MemoryBudgetError(
            f"a task takes up to {format_size(schedule.peak_host_bytes)} of memory, and Ray gives out at most "
            f"{format_size(largest)} on a machine; set a smaller memory budget (--memory), or start Ray with more"
        )
    return options


def _groups(job: MergeJob, slots: int) -> Iterator[list[str]]:
    """Cut what is pending into groups of neighbours, so that a worker reads files front to back."""
    sizes = {name: job.plan.tensors[name].bytes_read for name in job.pending}
    limit = min(GROUP_BYTES, sum(sizes.values()) // (slots * GROUPS_PER_SLOT))
    group: list[str] = []
    filled = 0
    for name, size in sizes.items():
        if group and filled + size > limit:
            yield group
            group, filled = [], 0
        group.append(name)
        filled += size
    if group:
        yield group


def _finished(ray: Any, result: Any) -> list[Finished]:
    """Return what a task reports; if it failed, raise what it raised."""
    try:
        entries: list[Finished] = ray.get(result)
        return entries
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, RtsvmError):
            raise error.cause from None
        reason = str(error).strip().splitlines()[-1]
        raise ClusterError(
            f"a worker of Ray failed: {reason}; every machine needs this package, and the models under the same paths"
        ) from error
    except ray.exceptions.RayError as error:
        reason = str(error).strip().splitlines()[0]
        raise ClusterError(f"a task of Ray was lost, and {RETRIES} retries were of no use: {reason}") from error


def _stop(ray: Any, running: list[Any]) -> None:
    """End what still runs, and wait for it: nobody should write into the stage when we return.

    Tasks are interrupted first. Ray ends the whole program if a task that it was forced to give up finishes after all.
    """
    for force in (False, True):
        for result in running:
            ray.cancel(result, force=force)
        if running:
            _, running = ray.wait(running, num_returns=len(running), timeout=GOODBYE_SECONDS)
