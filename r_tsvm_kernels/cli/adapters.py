"""What the commands that write a LoRA adapter share."""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING

from .recipe import DTYPES
from .terminal import say

if TYPE_CHECKING:
    from ..lora_tools import AdapterResult


def add_rank_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare how the rank of an update is chosen."""
    group = parser.add_argument_group("rank of each module")
    group.add_argument("--rank", metavar="N", type=int, help="the rank, or the most that --energy may choose")
    group.add_argument("--energy", metavar="E", type=float, help="as much as holds this share of the energy, e.g. 0.99")


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what all commands that write an adapter share."""
    group = parser.add_argument_group("how to run")
    group.add_argument("--out-dtype", choices=DTYPES, default="float32", help="of the factors (default %(default)s)")
    group.add_argument("--device", default="auto", metavar="D", help="auto, cpu, cuda or cuda:INDEX (default auto)")
    group.add_argument("--quiet", action="store_true", help="print errors only")


def print_result(result: AdapterResult) -> None:
    """Print the size of the adapter, how much of the change it retains, what is left out, and the paths."""
    ranks = [module.rank for module in result.modules.values() if module.rank]
    rank = f"rank {ranks[0]}" if min(ranks) == max(ranks) else f"ranks {min(ranks)} to {max(ranks)}"
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
