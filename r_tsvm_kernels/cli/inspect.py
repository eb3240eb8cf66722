"""Show what a merge would do to each tensor, why, and in how much memory. It reads no values but tables of integers.

rtsvm inspect recipe.yaml
rtsvm inspect --base B --model A --model C --method rtsvm --memory 8GB
"""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from ..sizes import format_size
from ..text import printable
from .recipe import add_recipe_arguments, make_config
from .resources import add_resource_arguments
from .terminal import console, say

if TYPE_CHECKING:
    from ..engine import Schedule
    from ..engine.calibrate import TimeEstimate
    from ..plan import MergePlan

HELP = "show the plan of a merge without computing"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("recipe", metavar="RECIPE.yaml", nargs="?", help="recipe file (if any)")
    add_recipe_arguments(parser)
    add_resource_arguments(parser).add_argument(
        "--estimate-time", action="store_true", help="also read and merge samples, for some seconds, to estimate time"
    )
    parser.add_argument("--json", action="store_true", help="print JSON for machines")


def run(arguments: argparse.Namespace) -> int:
    """Print the plan.

    Raises:
        MemoryBudgetError: the merge does not fit into the budgets.
        QuantisedRefusedError: a model is quantised, or has other integers than the base.
    """
    config = make_config(arguments, arguments.recipe)

    from ..engine import choose_device, choose_workers, make_schedule, smallest_schedule
    from ..engine.calibrate import estimate_time
    from ..engine.tiles import check_tables
    from ..plan import make_plan
    from ..sizes import parse_size

    plan = make_plan(config, parse_size(arguments.shard_size), allow_pickle=arguments.allow_pickle)
    check_tables(plan)
    device = choose_device(arguments.device)
    on_gpu = device.type == "cuda"
    budgets = [None if size is None else parse_size(size) for size in (arguments.memory, arguments.device_memory)]
    chosen = make_schedule(plan, choose_workers(arguments.threads, device), *budgets, on_gpu=on_gpu)
    seconds = estimate_time(plan, chosen.workers, device) if arguments.estimate_time else None
    facts = _as_dict(plan, chosen, smallest_schedule(plan, on_gpu), str(device), seconds)
    if arguments.json:
        print(json.dumps(facts, indent=2))
    else:
        _print_table(plan, facts)
    return 0


def _as_dict(
    plan: MergePlan, chosen: Schedule, smallest: Schedule, device: str, seconds: TimeEstimate | None
) -> dict[str, Any]:
    from ..plan import tensor_cost, total_flops

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
        "groups": plan.groups(),
        "tensors": {
            name: {
                "treatment": tensor.treatment.kind,
                "reason": tensor.treatment.reason,
                "shape": list(tensor.spec.shape),
                "dtype": _dtype_name(tensor.spec.dtype),
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


def _print_table(plan: MergePlan, facts: dict[str, Any]) -> None:
    from rich.table import Table

    title = f"{plan.config.method.pretty_name}: {len(plan.tuned)} models into {plan.base.path}"
    table = Table(title=printable(title))
    for heading in ("tensor", "shape", "dtype", "treatment", "rank <=", "rows at once", "memory MB", "why"):
        table.add_column(heading, overflow="fold")
    words = {"merge": plan.config.merge_method, "mean": "mean of task vectors", "base": "keep the base's"}
    for name, tensor in facts["tensors"].items():
        rows = tensor["shape"][0] if tensor["shape"] else 1
        cells = (
            name,
            "x".join(map(str, tensor["shape"])) or "scalar",
            tensor["dtype"],
            words[tensor["treatment"]],
            "" if tensor["rank_limit"] is None else str(tensor["rank_limit"]),
            str(tensor["tile_rows"]) if tensor["tile_rows"] < rows else "all",
            f"{(tensor['tile_input_bytes'] + tensor['tile_work_bytes']) / 1e6:,.1f}",
            tensor["reason"],
        )
        table.add_row(*map(printable, cells))
    console().print(table)
    for line in _summary(facts):
        say(line)


def _summary(facts: dict[str, Any]) -> list[str]:
    """Return the lines below the table."""
    limits, seconds = facts["schedule"], facts["seconds"]
    files = facts["input_files"]
    most = max(file["passes"] for file in files)
    order = "each once, front to back" if most == 1 else f"in up to {most} passes: not all are split like the base"
    lines = [
        f"{len(facts['tensors'])} tensors of {len(facts['groups'])} kinds, {facts['flops'] / 1e12:,.3f} Tflop, "
        f"{format_size(facts['bytes_read'])} to read, {format_size(facts['bytes_written'])} to write in "
        f"{len(facts['shards'])} file(s)",
        f"{len(files)} input file(s) read {order}",
        f"memory at most {format_size(limits['peak_host_bytes'])} with {limits['workers']} worker(s); "
        f"--memory can go down to {format_size(limits['smallest_host_bytes'])}",
    ]
    if limits["peak_device_bytes"]:
        lines.append(
            f"tensors on {limits['device']} at most {format_size(limits['peak_device_bytes'])}; "
            f"--device-memory can go down to {format_size(limits['smallest_device_bytes'])}"
        )
    if seconds is not None:
        parts = ", ".join(f"{seconds[part]:,.1f} s {part}" for part in ("reading", "computing", "writing"))
        lines.append(f"about {seconds['total']:,.1f} s in all: {parts}, side by side as far as they can")
    return lines


def _rank_limit(plan: MergePlan, name: str) -> int | None:
    """Return the largest rank one task can get, for the methods that have ranks."""
    from ..linalg import fixed_rank

    tensor = plan.tensors[name]
    if not plan.config.method.rank_per_task or tensor.treatment.kind != "merge":
        return None
    rows, columns = tensor.spec.shape
    return fixed_rank((rows, columns), len(plan.tuned))


def _dtype_name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
