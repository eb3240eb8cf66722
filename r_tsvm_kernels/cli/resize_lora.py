"""Cut a LoRA adapter to a smaller rank, exactly.

  rtsvm resize-lora ADAPTER --rank 8 OUT
  rtsvm resize-lora ADAPTER --energy 0.99 OUT

Each update is replaced by its best approximation of that rank, from two thin QRs and a small SVD.
"""

from __future__ import annotations

import argparse

from .adapters import add_output_arguments, add_rank_arguments, write_adapter

HELP = "cut a LoRA adapter to a smaller rank"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("adapter", metavar="ADAPTER", help="PEFT adapter: folder or hub id")
    add_rank_arguments(parser)
    add_output_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Resize and print what was kept."""
    from ..lora_tools import resize_lora

    return write_adapter(resize_lora, arguments, arguments.adapter)
