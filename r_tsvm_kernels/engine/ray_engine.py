"""The engine for several GPUs and machines: Ray runs the local engine on groups of tensors.

    driver: groups of tensors -> Ray -> workers: read, merge, write into the shards -> driver: journal

All machines see inputs and output under the same paths of a shared file system. A worker writes its tensors into the
shards, syncs them and returns journal entries. If a worker is lost, another one merges its group again: it writes the
same bytes to the same place, so the first one may still be writing.
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

from ..dispatch import forced_backends, settled, unusable, use_backend
from ..errors import BackendUnavailableError, ClusterError, DeviceError, MemoryBudgetError, RtsvmError
from ..plan import MergePlan
from ..sizes import format_size
from .fingerprint import kernels, software
from .job import COMMIT_SECONDS, MergeJob
from .journal import Finished
from .local import run_local
from .scheduling import Schedule
from .shards import Shards, layouts

# Bytes of inputs of a group: large compared with the cost of a task, small enough to lose little with a worker.
GROUP_BYTES = 512 << 20
# Groups per task slot, so that slots do not wait long for the last group.
GROUPS_PER_SLOT = 4
# Number of retries of a group after its worker was lost.
RETRIES = 3
# Tensors do not pass through Ray's object store, so a Ray that we start gets about the smallest store it allows.
OBJECT_STORE_BYTES = 100 << 20
# Seconds to wait for a cluster to answer.
CONNECT_SECONDS = 10.0
# Seconds to wait for cancelled workers to end.
GOODBYE_SECONDS = 10.0
# A process that has initialised CUDA cannot switch to another visible GPU, so Ray would start a new process for every
# task, which takes seconds. Instead every worker sees all GPUs of its machine and uses the one that Ray assigns.
GPU_OPTIONS = {
    "num_gpus": 1,
    "max_calls": 0,
    "runtime_env": {"env_vars": {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}},
}


@dataclass(frozen=True)
class _Order:
    """The facts that all groups of a merge share, sent to the workers once."""

    plan: MergePlan
    schedule: Schedule
    stage: Path
    device_type: str
    measure_norms: bool | None
    software: dict[str, Any]
    backends: dict[str, str]
    kernels: dict[str, str | None]
    folder: Path


def run_ray(
    job: MergeJob,
    schedule: Schedule,
    tensor_done: Callable[[str], None],
    *,
    tasks: int | None = None,
    address: str | None = None,
) -> None:
    """Merge all pending tensors; on return they are written and journaled.

    Without an address, an existing connection of the program to Ray is used; otherwise one is opened and closed.

    Args:
        job: the merge.
        schedule: threads, tiles and limits of one task.
        tensor_done: called in this thread with the name of each tensor after it was written.
        tasks: limit of concurrent tasks; None means as many as the cluster has resources for.
        address: address of a running cluster, e.g. ``10.0.0.1:6379``; None starts Ray on this machine alone.

    Raises:
        BackendUnavailableError: Ray is not installed.
        ClusterError: the cluster cannot be reached, its machines differ in software, or workers were lost repeatedly.
        DeviceError, MemoryBudgetError: no machine has the GPU or the memory that a task needs.

    Errors of reading, merging, writing and `tensor_done` are raised here.
    """
    ray = _import_ray()
    # Signals interrupt the main thread, so another thread writes the journal.
    with _signals_as_raised(), _connected(ray, address, tasks), ThreadPoolExecutor(1) as journal:
        options = _task_options(ray, job, schedule)
        slots = tasks or max(1, int(ray.cluster_resources().get("GPU" if "num_gpus" in options else "CPU", 1)))
        waiting = deque(_groups(job, schedule, slots))
        most = tasks or len(waiting)  # Ray queues tasks that lack resources
        task = ray.remote(**options)(merge_group)
        method = job.plan.config.method
        choice = forced_backends(), kernels(job.device, method)
        here = (job.device.type, job.measure_norms, software(job.device, method), *choice, Path.cwd())
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
        ClusterError: this machine's software differs from the driver's, so its bytes might differ.

    Errors of reading, merging and writing are raised here.
    """
    with use_backend(**order.backends), settled(order.kernels, order.device_type):
        return _merge_group(order, names)


def _merge_group(order: _Order, names: list[str]) -> list[Finished]:
    device = own_gpu() if order.device_type == "cuda" else torch.device("cpu")
    here = software(device, order.plan.config.method)
    if here != order.software:
        raise ClusterError(
            f"{platform.node()}: its software differs from the driver's, {here} here and {order.software} there; "
            "install the same versions everywhere, or start Ray on this machine alone"
        )
    for op, backend in order.kernels.items():
        reason = unusable(op, backend, order.device_type)
        if reason is not None:
            raise ClusterError(
                f"{platform.node()}: {op} cannot run on the backend {backend} here, as it does on the driver: "
                f"{reason}; force another backend (--backend {op}=torch), or start Ray on this machine alone"
            )
    with suppress(OSError):  # only relative paths need it
        os.chdir(order.folder)
    group = [layout for layout in layouts(order.plan) if not layout.specs.keys().isdisjoint(names)]
    # Opened for each group: a worker that outlives its driver must not find the shards of the next merge.
    with closing(Shards(order.stage, group)) as shards:
        part = _Part(order.plan, device, order.measure_norms, shards, names)
        run_local(part, order.schedule, lambda name: None)
    if order.device_type == "cuda":
        torch.cuda.empty_cache()  # the next task of this process may use another GPU
    return part.finished


def own_gpu() -> torch.device:
    """Return the GPU that Ray assigned to the calling task."""
    gpu = str(_import_ray().get_gpu_ids()[0])
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return torch.device("cuda", visible.split(",").index(gpu) if visible else int(gpu))


class _Part:
    """A group as a job of the local engine; the driver keeps the journal."""

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
    """Raise the error of a signal handler that the compiled part of Ray turned into a SystemError."""
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
    # By default Ray reports usage statistics over the network, and prints much.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    logging.getLogger("ray").setLevel(logging.ERROR)
    own = {} if address else {"num_cpus": tasks, "include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
    # Ray replaces the handler of SIGTERM; the caller's is restored.
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
    """Raise `ClusterError` if nothing answers at an address; Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if not port.isdecimal():
        return  # "auto"
    try:
        socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ClusterError(
            f"no Ray cluster answers at {address} ({error}); `ray start --head` starts one and prints its address"
        ) from error


def _task_options(ray: Any, job: MergeJob, schedule: Schedule) -> dict[str, Any]:
    """Return the resources of a task, after checking that some machine of the cluster has them."""
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
            f"a task needs up to {format_size(schedule.peak_host_bytes)} of memory, and Ray offers at most "
            f"{format_size(largest)} on a machine; set a smaller memory budget (--memory), or start Ray with more"
        )
    return options


def _groups(job: MergeJob, schedule: Schedule, slots: int) -> Iterator[list[str]]:
    """Cut pending tensors into groups of neighbours, so that a worker reads files front to back; cut no batch."""
    pending, tensors = set(job.pending), job.plan.tensors
    units = [(names, sum(tensors[name].bytes_read for name in names)) for names in schedule.groups]
    units = [(names, size) for names, size in units if not pending.isdisjoint(names)]
    limit = min(GROUP_BYTES, sum(size for _, size in units) // (slots * GROUPS_PER_SLOT))
    group: list[str] = []
    filled = 0
    for names, size in units:
        if group and filled + size > limit:
            yield group
            group, filled = [], 0
        group += [name for name in names if name in pending]
        filled += size
    if group:
        yield group


def _finished(ray: Any, result: Any) -> list[Finished]:
    """Return the entries of a task, or raise its error."""
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
        raise ClusterError(f"a task of Ray was lost, and {RETRIES} retries failed: {reason}") from error


def _stop(ray: Any, running: list[Any]) -> None:
    """Cancel running tasks and wait for them, so that none writes into the stage after the return.

    Tasks are interrupted before they are killed: Ray ends the whole program if a killed task finishes after all.
    """
    for force in (False, True):
        for result in running:
            ray.cancel(result, force=force)
        if running:
            _, running = ray.wait(running, num_returns=len(running), timeout=GOODBYE_SECONDS)
