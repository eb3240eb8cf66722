"""Show what a merge would do to each kind of tensor, why, with which parameters, and in how much memory.

No values are read except tables of integers. A row stands for the tensors of all layers that are treated in the same
way. Below it are the values of parameters that gradients and filters set. Columns: number of tensors; names, without
".weight"; shape; by: the method, "mean" (of the task vectors) or "base" (the base's value); the largest rank of a task;
memory for one of the tensors. Packed experts are merged one by one: their rank is that of one expert.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..sizes import format_size
from ..text import dtype_name
from .kinds import Kind, common_values, dtypes_of, kinds_of
from .recipe import add_recipe_arguments, make_config
from .resources import add_resource_arguments, chosen_backends
from .terminal import console, say

if TYPE_CHECKING:
    from ..engine import Schedule
    from ..engine.calibrate import TimeEstimate
    from ..plan import MergePlan

HELP = "show the plan of a merge without computing"
USAGE = """\
rtsvm inspect [options] RECIPE.yaml
       rtsvm inspect [options] --base B --model A [--model C ...]"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("recipe", metavar="RECIPE.yaml", nargs="?", help="recipe file (if any)")
    add_recipe_arguments(parser)
    add_resource_arguments(parser).add_argument(
        "--estimate-time", action="store_true", help="read and merge samples for some seconds to estimate the time"
    )
    parser.add_argument("--all", action="store_true", help="show each tensor in a row of its own")
    parser.add_argument("--json", action="store_true", help="print JSON for machines, with each tensor")


def run(arguments: argparse.Namespace) -> int:
    """Print the plan.

    Raises:
        MemoryBudgetError: the merge does not fit into the budgets.
        QuantisedRefusedError: a model is quantised, or has other integers than the base.
    """
    config = make_config(arguments, arguments.recipe)

    from ..engine import choose_device, choose_workers, make_schedule, smallest_schedule
    from ..engine.calibrate import estimate_time
    from ..engine.fingerprint import kernels
    from ..engine.tiles import check_tables
    from ..plan import make_plan
    from ..sizes import parse_size

    device = choose_device(arguments.device)
    on_gpu = device.type == "cuda"
    budgets = [None if size is None else parse_size(size) for size in (arguments.memory, arguments.device_memory)]
    with chosen_backends(arguments.backend, device):
        plan = make_plan(config, parse_size(arguments.shard_size), allow_pickle=arguments.allow_pickle)
        check_tables(plan)
        backends = kernels(device, config.method)
        chosen = make_schedule(plan, choose_workers(arguments.threads, device), *budgets, on_gpu=on_gpu)
        seconds = estimate_time(plan, chosen.workers, device) if arguments.estimate_time else None
        smallest = smallest_schedule(plan, on_gpu)
        facts = _as_dict(plan, chosen, smallest, str(device), seconds) | {"kernels": backends}
    if arguments.json:
        print(json.dumps(facts, indent=2))
    else:
        _print_kinds(plan, facts, each=arguments.all)
    return 0


def _as_dict(
    plan: MergePlan, chosen: Schedule, smallest: Schedule, device: str, seconds: TimeEstimate | None
) -> dict[str, Any]:
    from ..plan import common_parameters, model_parameters, tensor_cost, total_flops, varying_parameters

    return {
        "method": plan.config.merge_method,
        "base": str(plan.base.path),
        "models": [str(checkpoint.path) for checkpoint in plan.tuned],
        "bytes_read": plan.bytes_read,
        "bytes_written": plan.bytes_written,
        "flops": total_flops(plan),
        "input_files": [
            {"path": str(file.path), "bytes_read": file.bytes_read, "passes": file.passes}
            for file in plan.input_files()
        ],
        "shards": plan.shards,
        "dequantised": plan.dequantised,
        "dropped": {str(path): list(names) for path, names in plan.beside.items()},
        "notes": list(plan.notes),
        "vocabulary": None if plan.vocabulary is None else plan.vocabulary.summary(),
        "schedule": {
            "device": device,
            "workers": chosen.workers,
            "read_bytes": chosen.read_bytes,
            "work_bytes": chosen.work_bytes,
            "peak_host_bytes": chosen.peak_host_bytes,
            "peak_device_bytes": chosen.peak_device_bytes,
            "smallest_host_bytes": smallest.peak_host_bytes,
            "smallest_device_bytes": smallest.peak_device_bytes,
        },
        "seconds": None
        if seconds is None
        else {
            "reading": seconds.reading,
            "computing": seconds.computing,
            "writing": seconds.writing,
            "total": seconds.total,
        },
        "parameters": common_parameters(plan.config),
        "model_parameters": model_parameters(plan.config),
        "groups": plan.groups(),
        "kinds": {kind.label: list(kind.names) for kind in kinds_of(plan)},
        "tensors": {
            name: {
                "treatment": tensor.treatment.kind,
                "reason": tensor.treatment.reason,
                "parameters": varying_parameters(plan.section(name).config, tensor.options),
                "shape": list(tensor.spec.shape),
                "dtype": dtype_name(tensor.spec.dtype),
                "matrices": tensor.merged_apart.count(tensor.spec.shape),
                "matrix_shape": list(tensor.merged_apart.largest(tensor.spec.shape)),
                "rank_limit": _rank_limit(plan, name),
                "bytes_read": tensor.bytes_read,
                "bytes_written": tensor.spec.nbytes,
                "flops": tensor_cost(plan, name).flops,
                "tile_rows": chosen.tensors[name].tile_rows,
                "tile_input_bytes": chosen.tensors[name].inputs,
                "tile_work_bytes": chosen.tensors[name].work,
            }
            for name, tensor in plan.tensors.items()
        },
    }


def _print_kinds(plan: MergePlan, facts: dict[str, Any], *, each: bool) -> None:
    """Print one row for each kind of tensor, with its varying parameters below."""
    width = shutil.get_terminal_size((console().width, 24)).columns
    say(f"{plan.config.method.pretty_name}: {_counted(len(plan.tuned), 'model')}, base {plan.base.path}")
    say(f"writes {dtypes_of(plan)}")
    common = ", ".join(f"{key} {value}" for key, value in common_values(plan).items() if value != "[]")
    for line in textwrap.wrap(common, width - 2, initial_indent="with ", subsequent_indent="     "):
        say(line)
    rows = [_row(plan, facts, kind, each) for kind in kinds_of(plan, each=each)]
    heading = ("n", "tensors", "shape", "by", "rank", "memory")
    widths = [max(len(row[0][column]) for row in [(heading, ""), *rows]) for column in range(len(heading))]
    widths[1] = min(widths[1], width - sum(widths) + widths[1] - 2 * (len(widths) - 1))
    say("")
    for cells, note in [(heading, ""), *rows]:
        first, *more = _name_lines(cells[1], max(widths[1], 20))
        say("  ".join(_aligned((cells[0], first, *cells[2:]), widths)).rstrip())
        for line in more:
            say(f"{'':{widths[0]}}  {line}")
        for line in textwrap.wrap(note, width - widths[0] - 4):
            say(f"{'':{widths[0]}}    {line}")
    say("")
    for line in _summary(facts):
        for part in textwrap.wrap(line, width - 1, subsequent_indent="  "):
            say(part)


def _name_lines(name: str, width: int) -> list[str]:
    """Break a name after its dots, or anywhere if that is not enough."""
    lines = [""]
    for part in re.findall(r"[^.]*\.?", name):
        if len(lines[-1]) + len(part) > width and lines[-1]:
            lines.append("")
        lines[-1] += part
    return [line[start : start + width] for line in lines for start in range(0, max(len(line), 1), width)]


def _short_size(size: int) -> str:
    """Return a size in three characters or so: ``8.7GB``."""
    return f"{size / 1e9:.1f}GB" if size >= 1e8 else f"{size / 1e6:.1f}MB"


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> list[str]:
    """Return cells as wide as their columns: numbers to the right, text to the left."""
    right = (0, 4, 5)
    return [
        cell.rjust(size) if column in right else cell.ljust(size)
        for column, (cell, size) in enumerate(zip(cells, widths, strict=True))
    ]


def _row(plan: MergePlan, facts: dict[str, Any], kind: Kind, each: bool) -> tuple[tuple[str, ...], str]:
    """Return the cells of a kind, and the note below them."""
    tensor, count = facts["tensors"][kind.names[0]], len(kind.names)
    words = {"merge": plan.config.merge_method, "mean": "mean", "base": "base"}
    rows = tensor["shape"][0] if tensor["shape"] else 1
    notes = [tensor["reason"]] if tensor["reason"] else []
    if tensor["matrix_shape"] != tensor["shape"]:
        size = "x".join(map(str, tensor["matrix_shape"]))
        notes.append(f"{_counted(tensor['matrices'], 'matrix' if 'x' in size else 'vector')} of at most {size}")
    if tensor["tile_rows"] < rows:
        notes.append(f"{tensor['tile_rows']} rows at a time")
    notes += [f"{key} {value}" for key, value in kind.parameters.items()]
    cells = (
        str(count),
        kind.label if each else kind.label.removesuffix(".weight"),
        "x".join(map(str, tensor["shape"])) or "scalar",
        words[tensor["treatment"]],
        "" if tensor["rank_limit"] is None else str(tensor["rank_limit"]),
        _short_size(tensor["tile_input_bytes"] + tensor["tile_work_bytes"]),
    )
    return cells, "; ".join(notes)


def _summary(facts: dict[str, Any]) -> list[str]:
    """Return the lines below the table."""
    limits, seconds, files = facts["schedule"], facts["seconds"], facts["input_files"]
    most = max(file["passes"] for file in files)
    order = "once, front to back" if most == 1 else f"in up to {most} passes, as models are split or sorted differently"
    lines = [
        f"{len(facts['tensors'])} tensors, {facts['flops'] / 1e12:,.3f} Tflop",
        f"read: {format_size(facts['bytes_read'])} from {_counted(len(files), 'file')}, {order}",
        f"write: {format_size(facts['bytes_written'])} to {_counted(len(facts['shards']), 'file')}",
        f"memory: at most {format_size(limits['peak_host_bytes'])} with {_counted(limits['workers'], 'thread')}; "
        f"--memory can be as low as {format_size(limits['smallest_host_bytes'])}",
    ]
    lines += [
        f"dropped: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''} of {path}; the base lacks "
        f"{'it' if len(names) == 1 else f'these {len(names)} tensors'}"
        for path, names in facts["dropped"].items()
    ]
    lines += facts["vocabulary"]["lines"] if facts["vocabulary"] else []
    lines += [f"note: {note}" for note in facts["notes"]]
    lines += [
        f"dequantised: {_counted(count, 'weight')} of {path}, read as the values that FP8 or MXFP4 and scales stand for"
        for path, count in facts["dequantised"].items()
    ]
    if limits["peak_device_bytes"]:
        lines.append(
            f"GPU memory on {limits['device']}: at most {format_size(limits['peak_device_bytes'])}; "
            f"--device-memory can be as low as {format_size(limits['smallest_device_bytes'])}"
        )
    if seconds is not None:
        parts = ", ".join(f"{part} {seconds[part]:,.1f} s" for part in ("reading", "computing", "writing"))
        lines.append(f"time: about {seconds['total']:,.1f} s ({parts}, overlapping where possible)")
    return lines


def _counted(count: int, noun: str) -> str:
    many = "matrices" if noun == "matrix" else f"{noun}s"
    return f"{count} {noun if count == 1 else many}"


def _rank_limit(plan: MergePlan, name: str) -> int | None:
    """Return the largest rank one task can get, for the methods that have ranks."""
    from ..linalg import fixed_rank

    tensor = plan.tensors[name]
    if not plan.config.method.rank_per_task or tensor.treatment.kind != "merge":
        return None
    rows, columns = tensor.merged_apart.largest(tensor.spec.shape)
    if "shared" in getattr(tensor.options, "rank", ()):  # all others have one direction
        return min(rows, columns) - len(plan.tuned) + 1
    return fixed_rank((rows, columns), len(plan.tuned))
