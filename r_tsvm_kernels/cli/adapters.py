"""Code shared by the commands that write a LoRA adapter."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .progress import shown_progress
from .recipe import DTYPES
from .resources import add_device_argument
from .terminal import say

if TYPE_CHECKING:
    from ..lora_tools import AdapterResult


def add_rank_arguments(parser: argparse.ArgumentParser, default: str = "no limit") -> argparse._ArgumentGroup:
    """Declare how the rank of an update is chosen; more may be added to the group that is returned."""
    group = parser.add_argument_group("rank of each module")
    group.add_argument("--rank", metavar="N", type=int, help=f"the rank, the largest with a rule (default: {default})")
    group.add_argument(
        "--energy", metavar="E", type=float, help="smallest rank that keeps this fraction of the energy, e.g. 0.95"
    )
    return group


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of every command that writes an adapter."""
    parser.add_argument("out", metavar="OUT", help="folder of the adapter; must not exist yet")
    group = parser.add_argument_group("how to run")
    group.add_argument("--out-dtype", choices=DTYPES, default="float32", help="dtype of the factors (default float32)")
    add_device_argument(group)
    group.add_argument("--quiet", action="store_true", help="print errors only")


def write_adapter(
    make: Callable[..., AdapterResult], arguments: argparse.Namespace, *inputs: Any, **options: Any
) -> int:
    """Write an adapter with `make`, print its size and how much it keeps, and return the exit code."""
    with shown_progress(arguments.quiet) as show:
        result = make(
            *inputs,
            arguments.out,
            rank=arguments.rank,
            energy=arguments.energy,
            out_dtype=arguments.out_dtype,
            device=arguments.device,
            progress=show,
            **options,
        )
    if not arguments.quiet:
        print_result(result)
    return 0


def print_result(result: AdapterResult) -> None:
    """Print the size of the adapter, how much of the change it retains, what is left out, and the paths."""
    ranks = [module.rank for module in result.modules.values() if module.rank]
    low, high = min(ranks, default=0), max(ranks, default=0)
    rank = f"rank {low}" if low == high else f"ranks {low} to {high}"
    say(
        f"{len(ranks)} modules of {rank}, at least {_percent(result.least_captured_energy)} of the energy of each, "
        f"in {result.seconds:.1f} s -> {result.path}"
    )
    lost: dict[str, list[float]] = {}
    for tensor in result.left_out.values():
        if tensor.norm:
            lost.setdefault(tensor.reason, []).append(tensor.norm**2)
    if lost:
        say(f"left out: {_percent(result.left_out_energy)} of the energy of the whole change")
        total = sum(map(sum, lost.values()))
        for reason, squares in lost.items():
            share = _percent(result.left_out_energy * sum(squares) / total)
            say(f"  {share} in {len(squares)} tensor{'s' if len(squares) > 1 else ''}: {reason}")
    say(f"report: {result.report_path}")


def _percent(share: float) -> str:
    return f"{math.floor(1000 * share) / 10} %"
