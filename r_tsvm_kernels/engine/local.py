"""Merge checkpoints on this machine, one tensor at a time."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..checkpoint import MergePlan, ShardWriter, make_plan, parse_size, write_index
from ..config import MergeConfig
from ..errors import CheckpointError, ConfigError, DeviceError
from ..merge import merge_tensors
from ..methods import TensorReport
from .output import copy_companions, is_single_file, refuse_existing, report_path, staged, write_json


@dataclass(frozen=True)
class Progress:
    """State of a running merge, passed to the `progress` callback after each tensor."""

    tensor: str
    tensors_done: int
    tensors_total: int
    bytes_done: int
    bytes_total: int


@dataclass(frozen=True)
class CheckpointResult:
    """A finished merge of checkpoints.

    Attributes:
        path: the output folder or file.
        report_path: the JSON report.
        reports: one per tensor.
        seconds: wall time of the whole merge.
    """

    path: Path
    report_path: Path
    reports: dict[str, TensorReport]
    seconds: float


def merge_checkpoints(
    config: MergeConfig,
    out: str | Path,
    *,
    device: str = "auto",
    threads: int | None = None,
    shard_size: str | int = "5GB",
    progress: Callable[[Progress], None] | None = None,
) -> CheckpointResult:
    """Merge the checkpoints a recipe names and write the result.

    Tensors stream: at most one tensor of every model is in memory. The output is written beside its final place and
    moved there when it is complete; after a failure nothing is left.

    Args:
        config: recipe with ``models``, and ``base_model`` where the method needs one.
        out: a folder that does not exist yet or is empty (Hugging Face layout, with the base's configuration and
            tokenizer files), or a path ending in .safetensors for one bare file.
        device: ``auto`` (a GPU if there is one), ``cpu``, ``cuda`` or ``cuda:1``.
        threads: CPU threads; None leaves torch's setting.
        shard_size: largest output shard, e.g. ``5GB``; ignored for a single file.
        progress: called after each tensor.

    Returns:
        CheckpointResult with the path and a report per tensor.

    Raises:
        ConfigError, DeviceError, OutputExists: the request cannot be carried out as written.
        CheckpointError, ShapeError, DTypeError, NonFiniteError, ConvergenceError: an input is damaged, or the inputs
            do not fit together; the message names file and tensor.
    """
    start = time.perf_counter()
    out = Path(out)
    target = choose_device(device)
    single = is_single_file(out)
    refuse_existing(out)
    plan = make_plan(config, 2**63 if single else parse_size(shard_size), out.stem if single else None)
    with staged(out) as stage, _threads(threads):
        reports = _write_tensors(plan, stage, target, progress)
        seconds = time.perf_counter() - start
        if not single:
            copy_companions(plan.base, stage, config.out_dtype or config.dtype)
            (stage / "merge_recipe.yaml").write_text(config.to_yaml(), encoding="utf-8")
        report = _report(plan, reports, target, seconds)
        write_json(stage / report_path(out).name, report)
    return CheckpointResult(out, report_path(out), reports, seconds)


def choose_device(device: str) -> torch.device:
    """Turn ``auto``, ``cpu``, ``cuda`` or ``cuda:1`` into a device that is there.

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


def _write_tensors(
    plan: MergePlan, stage: Path, device: torch.device, progress: Callable[[Progress], None] | None
) -> dict[str, TensorReport]:
    reports: dict[str, TensorReport] = {}
    done = 0
    for checkpoint, embedding in plan.tied_heads:
        head = checkpoint.load("lm_head.weight")
        if not torch.equal(head, checkpoint.load(embedding)):
            raise CheckpointError(
                f"{checkpoint.path}: the base ties lm_head.weight to {embedding}, but here the two differ; "
                "set tie_word_embeddings to false in the base's config.json and store its head, or retie this model"
            )
    for file, names in plan.shards.items():
        with ShardWriter(stage / file, {name: plan.tensors[name].spec for name in names}) as writer:
            for name in names:
                tensor = plan.tensors[name]
                base = plan.base.load(name, device)
                # A tensor that keeps the base's value needs no second model.
                tuned = [base if tensor.treatment.kind == "base" else c.load(name, device) for c in plan.tuned]
                result = merge_tensors(
                    base, tuned, plan.config, name=name, position=tensor.position, out_dtype=tensor.spec.dtype
                )
                writer.write(name, result.weight)
                reports[name] = result.report
                done += tensor.bytes_read
                if progress:
                    progress(Progress(name, len(reports), len(plan.tensors), done, plan.bytes_read))
    if len(plan.shards) > 1:
        stem = next(iter(plan.shards)).rsplit("-", 3)[0]
        shard_of = {name: file for file, names in plan.shards.items() for name in names}
        specs = {name: tensor.spec for name, tensor in plan.tensors.items()}
        write_index(stage / f"{stem}.safetensors.index.json", specs, shard_of)
    return reports


def _report(plan: MergePlan, reports: dict[str, TensorReport], device: torch.device, seconds: float) -> dict[str, Any]:
    recipe = plan.config.model_dump(mode="json", exclude_defaults=True)
    return {
        "recipe": {"merge_method": plan.config.merge_method, **recipe},
        "parameters": plan.config.options(len(plan.tuned)).model_dump(mode="json"),
        "versions": {
            "r_tsvm_kernels": __version__, "torch": torch.__version__, "python": platform.python_version(),
        },
        "device": str(device),
        "seconds": seconds,
        "bytes_read": plan.bytes_read,
        "bytes_written": plan.bytes_written,
        "tensors": {name: asdict(report) for name, report in reports.items()},
    }  # fmt: skip


@contextmanager
def _threads(threads: int | None) -> Iterator[None]:
    """Use this many CPU threads inside the block."""
    if threads is not None and threads < 1:
        raise ConfigError(f"threads must be at least 1, got {threads}")
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
