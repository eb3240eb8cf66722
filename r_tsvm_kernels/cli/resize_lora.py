"""Cut a LoRA adapter to a smaller rank, exactly.

  rtsvm resize-lora ADAPTER --rank 8 OUT
  rtsvm resize-lora ADAPTER --energy 0.99 OUT

Each update is replaced by its best approximation of that rank, from two thin QRs and a small SVD.
"""

from __future__ import annotations

import argparse

from .adapters import add_output_arguments, add_rank_arguments, print_result
from .progress import shown_progress

HELP = "cut a LoRA adapter to a smaller rank"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("adapter", metavar="ADAPTER", help="PEFT adapter: folder or hub id")
    parser.add_argument("out", metavar="OUT", help="folder of the new adapter; must not exist yet")
    add_rank_arguments(parser)
    add_output_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Resize and say what was kept."""
    from ..lora_tools import resize_lora

    with shown_progress(arguments.quiet) as show:
        result = resize_lora(
            arguments.adapter,
            arguments.out,
            rank=arguments.rank,
            energy=arguments.energy,
            out_dtype=arguments.out_dtype,
            device=arguments.device,
            progress=show,
        )
    if not arguments.quiet:
        print_result(result)
    return 0
