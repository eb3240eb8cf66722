"""`merge_checkpoints`: from a recipe to a finished output."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import dispatch
from ..checkpoint import Checkpoint
from ..config import MergeConfig
from ..errors import ConfigError, DeviceError
from ..files import write_text
from ..methods import TensorReport
from ..ops._checks import whole
from ..plan import MergePlan, make_plan
from ..sizes import parse_size
from ..state_dicts import summary
from ..text import printable
from .chat_template import check_chat_template, set_chat_template
from .fingerprint import difference, fingerprint
from .job import MergeJob, open_job, settled_kernels
from .journal import as_report, read_journal
from .local import run_local
from .output import is_single_file, journal_path, locked_stage, refuse_existing, report_path
from .ray_engine import run_ray
from .report import write_card, write_report
from .scheduling import make_schedule
from .shards import layouts, write_indexes
from .sidecar_files import copy_sidecar_files, fit_layers
from .steps import merge_in_steps, with_base_as_step
from .tiles import check_copies
from .tokenizer_files import fit_vocabulary

_LOG = logging.getLogger(__name__)

# On a GPU a second worker copies while the first computes.
_GPU_WORKERS = 2

ENGINES = ("local", "ray")


@dataclass(frozen=True)
class Progress:
    """State of a running merge, passed to the `progress` callback after each tensor."""

    tensor: str
    tensors_done: int
    tensors_total: int
    bytes_done: int
    bytes_total: int


@dataclass(frozen=True, repr=False)
class CheckpointResult:
    """A finished merge of checkpoints.

    Attributes:
        path: the output folder or file.
        report_path: the JSON report.
        reports: one per tensor, in the order of the plan.
        resumed: number of tensors that an earlier, stopped merge had finished.
        seconds: wall time; after a resumption, that of the last part.
    """

    path: Path
    report_path: Path
    reports: dict[str, TensorReport]
    resumed: int
    seconds: float

    def __repr__(self) -> str:
        return f"CheckpointResult({summary(self.reports)}, {self.path}, {self.seconds:.3g} s)"


def merge_checkpoints(
    config: MergeConfig | str | Path,
    out: str | Path,
    *,
    device: str = "auto",
    threads: int | None = None,
    memory: str | int | None = None,
    device_memory: str | int | None = None,
    shard_size: str | int = "5GB",
    allow_pickle: bool = False,
    resume: bool = False,
    restart: bool = False,
    engine: str = "local",
    ray_address: str | None = None,
    measure_norms: bool | None = None,
    progress: Callable[[Progress], None] | None = None,
    steps: str | Path | None = None,
) -> CheckpointResult:
    """Merge the checkpoints a recipe names and write the result.

    Tensors stream through memory of a fixed size. The output is written to ``.OUT.partial`` beside `out` and moved to
    `out` when it is complete. If an error, a signal or a power cut stops the merge, finished tensors stay there, and
    resuming gives the same bytes. The result does not depend on `threads`, `memory`, the engine, or on whether and
    where the merge was resumed. The logger ``r_tsvm_kernels`` records the notes of
    the plan (WARNING), decisions (INFO) and tensors (DEBUG).

    Args:
        config: recipe, or the path of its YAML file, with ``models``, and with ``base_model`` if the method needs one.
        out: a folder that does not exist or is empty (Hugging Face layout, with the base's configuration and tokenizer
            files), or a path ending in .safetensors for a single file.
        device: ``auto`` (a GPU if there is one), ``cpu``, ``cuda`` or ``cuda:1``.
        threads: number of tensors that are merged at a time, each by one thread; None means one per core on a CPU.
            Fewer are used if `memory` does not suffice.
        memory: memory limit of the whole process, e.g. ``8GB``; None means as much as the threads need.
        device_memory: limit of the GPU memory of the process, with the CUDA context, libraries and caches.
        shard_size: size limit of output shards, e.g. ``5GB``; ignored for a single file.
        allow_pickle: read models that exist only as pickle; only tensors are unpickled.
        resume: continue a stopped merge into `out`, if there is one.
        restart: discard a stopped merge into `out`.
        engine: ``local``, or ``ray`` for several GPUs or machines with a shared file system. With Ray, `threads` limits
            the number of concurrent tasks; each task has its own process and memory budget.
        ray_address: address of a running Ray cluster, e.g. ``10.0.0.1:6379``; None starts Ray on this machine alone.
        measure_norms: report the norms of task vectors and updates, which takes one more pass over the tensors; None
            measures them for spectral methods only, where the cost is small.
        progress: called after each tensor, in the calling thread.
        steps: folder that keeps the outputs of a recipe's other documents, each under its name. Outputs that are there
            already, of the same merge, are used. None makes ``.OUT.steps`` beside `out`, which is removed at the end.

    Returns:
        CheckpointResult with the path and a report per tensor.

    Raises:
        ConfigError, DeviceError, OutputExistsError, MemoryBudgetError: the request is invalid, or does not fit here.
        BackendUnavailableError, ClusterError: Ray is not installed, or the cluster failed.
        OutputBusyError: another merge into `out` is running.
        OutputUnfinishedError: a merge into `out` was stopped, and neither `resume` nor `restart` is set.
        ResumeRefusedError, JournalError: the stopped merge cannot be resumed; the message says what changed.
        CheckpointError, ShapeError, DTypeError, NonFiniteError, ConvergenceError: an input is damaged, or the inputs
            do not match; the message names file and tensor.
        InputChangedError: an input changed during the merge.
        DiskFullError: there is no space for the output.

    Examples:
        >>> from safetensors.torch import save_file
        >>> for name, value in (("base", 0.0), ("math", 1.0), ("code", 3.0)):
        ...     save_file({"w": torch.full((2, 2), value)}, f"{name}.safetensors")
        >>> config = MergeConfig("task_arithmetic", base_model="base.safetensors",
        ...                      models=["math.safetensors", "code.safetensors"], alpha=0.5)
        >>> merge_checkpoints(config, "merged").reports["w"].weights
        [1.0, 1.0]
        >>> from r_tsvm_kernels import verify_output
        >>> verify_output("merged").ok
        True
    """
    config, out = config if isinstance(config, MergeConfig) else MergeConfig.from_yaml(config), Path(out)
    config = with_base_as_step(config)
    if config.steps.keys() - config.places.keys():
        kept = None if steps is None else Path(steps)
        options: dict[str, Any] = {
            "device": device, "threads": threads, "memory": memory, "device_memory": device_memory,
            "shard_size": shard_size, "allow_pickle": allow_pickle, "restart": restart and kept is not None,
            "engine": engine, "ray_address": ray_address, "measure_norms": measure_norms, "progress": progress,
        }  # fmt: skip

        def merge(own: MergeConfig, place: Path, resumed: bool) -> CheckpointResult:
            return merge_checkpoints(own, place, resume=resumed, **options)

        def change(own: MergeConfig, place: Path) -> str | None:
            plan = make_plan(own, parse_size(shard_size), allow_pickle=allow_pickle)
            return difference(read_journal(journal_path(place))[0], fingerprint(plan, choose_device(device)))

        return merge_in_steps(config, out, kept, merge, change, resume=resume, restart=restart)
    run = Run.given(
        out,
        device=device,
        threads=threads,
        memory=memory,
        device_memory=device_memory,
        resume=resume,
        restart=restart,
        engine=engine,
        ray_address=ray_address,
        measure_norms=measure_norms,
        progress=progress,
    )
    single = is_single_file(out)
    check_chat_template(config.chat_template)
    shard_bytes, stem = (2**63, out.stem) if single else (parse_size(shard_size), None)
    plan = make_plan(config, shard_bytes, stem, allow_pickle=allow_pickle)
    if single and plan.vocabulary is not None and (plan.vocabulary.names or plan.vocabulary.owner is not plan.base):
        _LOG.warning("%s: a single file has no tokenizer beside it; merge into a folder to get the one that fits", out)
    if single and config.chat_template is not None:
        _LOG.warning("%s: a single file has no chat template beside it; merge into a folder to get one", out)
    return run.carry_out(plan, _begin, _complete)


@dataclass(frozen=True)
class Run:
    """Where and with what an output is made; the attributes are the arguments of `merge_checkpoints`."""

    out: Path
    device: torch.device
    workers: int
    threads: int | None
    memory: int | None
    device_memory: int | None
    resume: bool
    restart: bool
    engine: str
    ray_address: str | None
    measure_norms: bool | None
    progress: Callable[[Progress], None] | None

    @classmethod
    def given(
        cls,
        out: Path,
        *,
        device: str,
        threads: int | None,
        memory: str | int | None,
        device_memory: str | int | None,
        resume: bool,
        restart: bool,
        engine: str = "local",
        ray_address: str | None = None,
        measure_norms: bool | None = None,
        progress: Callable[[Progress], None] | None = None,
    ) -> Run:
        """Check the arguments of `merge_checkpoints`, and that the output is free.

        Raises:
            ConfigError, DeviceError, OutputExistsError: the request is invalid.
        """
        target = choose_device(device)
        workers = choose_workers(threads, target, engine)
        if ray_address is not None and engine != "ray":
            raise ConfigError(f"ray_address is for the ray engine, got engine {engine!r}")
        if resume and restart:
            raise ConfigError("resume continues the merge that was stopped and restart throws it away; choose one")
        refuse_existing(out)
        host, own = (None if size is None else parse_size(size) for size in (memory, device_memory))
        switches = (resume, restart, engine, ray_address, measure_norms, progress)
        return cls(out, target, workers, threads, host, own, *switches)

    def carry_out(
        self, plan: MergePlan, begin: Callable[[MergeJob], None], complete: Callable[[MergeJob], None]
    ) -> CheckpointResult:
        """Carry out a plan.

        Args:
            plan: the plan.
            begin: writes the files that must not fail at the end.
            complete: writes the other files beside the tensors, when these are finished.
        """
        start, out, config = time.perf_counter(), self.out, plan.config
        _LOG.info(
            "%s of %d models into %s: %d tensors, %d bytes to read, on %s with the %s engine",
            *(config.merge_method, len(plan.tuned), out, len(plan.tensors), plan.bytes_read, self.device, self.engine),
        )
        for note in plan.notes:
            _LOG.warning("%s", printable(note))
        with dispatch.settled(settled_kernels(plan, out, self.device, self.resume), self.device.type):
            on_gpu = self.device.type == "cuda"
            schedule = make_schedule(plan, self.workers, self.memory, self.device_memory, on_gpu=on_gpu)
            check_copies(plan)
            with (
                locked_stage(out) as stage,
                open_job(plan, stage, self.device, resume=self.resume, restart=self.restart) as job,
            ):
                job.measure_norms = self.measure_norms
                begin(job)
                if job.resumed:
                    _LOG.info("resumed: %d of %d tensors are finished already", job.resumed, len(plan.tensors))
                tensor_done = _reporter(job, self.progress)
                if self.engine == "ray":
                    run_ray(job, schedule, tensor_done, tasks=self.threads, address=self.ray_address)
                else:
                    run_local(job, schedule, tensor_done)
                seconds = time.perf_counter() - start
                for checkpoint in plan.inputs:
                    checkpoint.check_unchanged()
                complete(job)
                facts = {"engine": self.engine, "threads": schedule.workers}
                write_report(job, {**facts, "seconds": seconds, "resumed_tensors": job.resumed})
                job.close()
                stage.publish()
            done, finished = "decomposed" if plan.decomposed else "merged", len(plan.tensors) - job.resumed
            _LOG.info("%s %d tensors into %s in %.1f s", done, finished, out, seconds)
            reports = {name: as_report(job.finished[name].report) for name in plan.tensors}
            return CheckpointResult(out, report_path(out), reports, job.resumed, seconds)


def choose_device(device: str) -> torch.device:
    """Return the device of this machine that ``auto``, ``cpu``, ``cuda`` or ``cuda:1`` names.

    Raises:
        DeviceError: an unknown name, or no such device on this machine.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        chosen = None
    if chosen is None or chosen.type not in ("cpu", "cuda"):
        raise DeviceError(f"device must be auto, cpu, cuda or cuda:INDEX, got {device!r}")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise DeviceError(f"{device}: torch sees {torch.cuda.device_count()} CUDA devices; use --device cpu")
    return chosen


def choose_workers(threads: int | None, device: torch.device, engine: str = "local") -> int:
    """Return the number of merging threads of one process, if memory allows: `threads`, or a default of the device.

    Raises:
        ConfigError: fewer than one, or an unknown engine.
    """
    if engine not in ENGINES:
        raise ConfigError(f"engine must be one of {', '.join(ENGINES)}, got {engine!r}")
    if threads is not None and whole(threads, "threads") < 1:
        raise ConfigError(f"threads must be at least 1, got {threads}")
    if engine == "ray":
        return _GPU_WORKERS if device.type == "cuda" else 1
    return threads or (_GPU_WORKERS if device.type == "cuda" else torch.get_num_threads())


def _reporter(job: MergeJob, progress: Callable[[Progress], None] | None) -> Callable[[str], None]:
    """Return a function that reports a finished tensor, given its name, as `Progress`."""
    plan = job.plan
    done = [name for name in plan.tensors if name in job.finished]
    bytes_done = sum(plan.tensors[name].bytes_read for name in done)

    def tensor_done(name: str) -> None:
        nonlocal bytes_done
        done.append(name)
        bytes_done += plan.tensors[name].bytes_read
        _LOG.debug("%d of %d: %s", len(done), len(plan.tensors), name)
        if progress:
            progress(Progress(name, len(done), len(plan.tensors), bytes_done, plan.bytes_read))

    return tensor_done


def _begin(job: MergeJob) -> None:
    """Write the files beside the weights that come from the inputs: an unreadable one should stop the merge first."""
    plan, stage, config = job.plan, job.stage, job.plan.config
    if is_single_file(stage.out):
        return
    copy_sidecar_files(plan.base, stage.folder, config.out_dtype or config.dtype, quantised=config.requantise)
    if plan.vocabulary is not None:
        fit_vocabulary(plan.vocabulary, plan.base, stage.folder)
    fit_layers(plan, stage.folder)
    if config.chat_template is not None:
        checkpoints = [source for source in plan.inputs if isinstance(source, Checkpoint)]
        set_chat_template(config.chat_template, checkpoints, _main_folder(plan, stage.folder))


def _main_folder(plan: MergePlan, folder: Path) -> Path:
    """Return the folder of the output that its configuration and tokenizer are in."""
    base = plan.base
    return folder if base.main is None or base.folder is None else folder / base.main.relative_to(base.folder)


def _complete(job: MergeJob) -> None:
    """Write the other files beside the weights."""
    plan, stage = job.plan, job.stage
    write_indexes(stage.folder, layouts(plan))
    if not is_single_file(stage.out):
        write_text(stage.folder / "merge_recipe.yaml", plan.config.to_yaml())
        write_card(plan, stage.folder)
