"""Show what a merge would do to each tensor, and why, without reading any values.

rtsvm inspect recipe.yaml
rtsvm inspect --base B --model A --model C --method rtsvm
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from .recipe import add_recipe_arguments, make_config

if TYPE_CHECKING:
    from ..checkpoint import MergePlan

HELP = "show the plan of a merge without computing"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("recipe", metavar="RECIPE.yaml", nargs="?", help="recipe file (if any)")
    add_recipe_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print JSON for machines")


def run(arguments: argparse.Namespace) -> int:
    """Print the plan."""
    config = make_config(arguments, arguments.recipe)

    from ..checkpoint import make_plan, parse_size

    plan = make_plan(config, parse_size(arguments.shard_size))
    if arguments.json:
        print(json.dumps(_as_dict(plan), indent=2))
    else:
        _print_table(plan)
    return 0


def _as_dict(plan: MergePlan) -> dict[str, Any]:
    return {
        "method": plan.config.merge_method,
        "base": str(plan.base.path),
        "models": [str(checkpoint.path) for checkpoint in plan.tuned],
        "bytes_read": plan.bytes_read,
        "bytes_written": plan.bytes_written,
        "shards": plan.shards,
        "tensors": {
            name: {
                "treatment": tensor.treatment.kind,
                "reason": tensor.treatment.reason,
                "shape": list(tensor.spec.shape),
                "dtype": _dtype_name(tensor.spec.dtype),
                "rank_limit": _rank_limit(plan, name),
            }
            for name, tensor in plan.tensors.items()
        },
    }


def _print_table(plan: MergePlan) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 160)
    table = Table(title=f"{plan.config.method.pretty_name}: {len(plan.tuned)} models into {plan.base.path}")
    for heading in ("tensor", "shape", "dtype", "treatment", "rank <=", "why"):
        table.add_column(heading, overflow="fold")
    for name, tensor in plan.tensors.items():
        limit = _rank_limit(plan, name)
        table.add_row(
            name,
            "x".join(map(str, tensor.spec.shape)) or "scalar",
            _dtype_name(tensor.spec.dtype),
            {"merge": plan.config.merge_method, "mean": "mean of task vectors", "base": "keep the base's"}[
                tensor.treatment.kind
            ],
            "" if limit is None else str(limit),
            tensor.treatment.reason,
        )
    console.print(table)
    console.print(
        f"{len(plan.tensors)} tensors, {plan.bytes_read / 1e6:,.1f} MB to read, "
        f"{plan.bytes_written / 1e6:,.1f} MB to write in {len(plan.shards)} file(s)"
    )


def _rank_limit(plan: MergePlan, name: str) -> int | None:
    """Return the largest rank one task can get, for the methods that have ranks."""
    from ..linalg import fixed_rank

    tensor = plan.tensors[name]
    if not plan.config.method.matrices_only or tensor.treatment.kind != "merge":
        return None
    rows, columns = tensor.spec.shape
    return fixed_rank((rows, columns), len(plan.tuned))


def _dtype_name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
