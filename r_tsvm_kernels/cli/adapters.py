"""What the commands that write a LoRA adapter share."""

from __future__ import annotations

import argparse
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
    """Say how large the adapter is, how much it holds and where it lies."""
    ranks = [module.rank for module in result.modules.values() if module.rank]
    say(
        f"{len(ranks)} modules of rank {min(ranks)} to {max(ranks)}, {100 * result.captured_energy:.2f} % of the "
        f"energy, in {result.seconds:.1f} s -> {result.path}"
    )
    say(f"report: {result.report_path}")
