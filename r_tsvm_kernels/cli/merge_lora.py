"""Merge LoRA adapters of one base into one adapter.

  rtsvm merge-lora --adapter A --adapter B OUT
  rtsvm merge-lora --adapter A --adapter B --weight 0.7 --weight 0.3 OUT

The updates stay factored: no dense matrix is formed. Without --rank and --energy nothing is cut; ranks add up.
"""

from __future__ import annotations

import argparse

from .adapters import add_output_arguments, add_rank_arguments, write_adapter
from .recipe import one_weight_each

HELP = "merge LoRA adapters into one adapter"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "--adapter", metavar="A", action="append", required=True, help="PEFT adapter: folder or hub id; repeat"
    )
    parser.add_argument(
        "--weight",
        metavar="W",
        action="append",
        type=float,
        default=[],
        help="weight of an adapter (default 1); one for each --adapter",
    )
    parser.add_argument(
        "--method",
        choices=("tsvm", "linear", "task_arithmetic"),
        default="tsvm",
        help="TSV-Merge, weighted average or weighted sum of the updates (default %(default)s)",
    )
    add_rank_arguments(parser)
    add_output_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Merge and print what was kept."""
    one_weight_each(arguments.weight, arguments.adapter, "--adapter")

    from ..lora_tools import merge_lora

    return write_adapter(
        merge_lora, arguments, arguments.adapter, method=arguments.method, weight=arguments.weight or 1.0
    )
