"""Turn a fine-tuned model into a LoRA adapter that PEFT reads.

  rtsvm extract-lora --base B --model M --rank 64 OUT
  rtsvm extract-lora --base B --model M --energy 0.95 OUT

Every matrix that the fine-tune changed becomes the truncated SVD of its change. What an adapter cannot express (norms,
biases; embeddings and the output head without --embed-lora) stays the base's and is listed, with the size of its
change, in OUT/lora_report.json.
"""

from __future__ import annotations

import argparse

from .adapters import add_output_arguments, print_result
from .progress import shown_progress

HELP = "turn a fine-tuned model into a LoRA adapter"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("out", metavar="OUT", help="folder of the adapter; must not exist yet")
    parser.add_argument("--base", metavar="B", required=True, help="base model: folder, .safetensors file or hub id")
    parser.add_argument("--model", metavar="M", required=True, help="the fine-tuned model")
    group = parser.add_argument_group("rank of each matrix")
    group.add_argument("--rank", metavar="N", type=int, help="the rank, or the most a rule may choose (default 128)")
    rules = group.add_mutually_exclusive_group()
    rules.add_argument("--energy", metavar="E", type=float, help="as much as holds this share of the energy, e.g. 0.95")
    rules.add_argument("--noise", action="store_true", help="the singular values above the noise edge")
    group = parser.add_argument_group("what to adapt")
    group.add_argument("--include", metavar="PATTERN", action="append", default=[], help="adapt only these tensors")
    group.add_argument("--exclude", metavar="PATTERN", action="append", default=[], help="leave these tensors out")
    group.add_argument("--embed-lora", action="store_true", help="adapt embeddings and the output head too")
    group.add_argument(
        "--fan-in-fan-out",
        action=argparse.BooleanOptionalAction,
        help="weights are stored (in, out) (default: if the base is a GPT-2)",
    )
    add_output_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Extract and say what was captured."""
    from ..lora_tools import extract_lora

    with shown_progress(arguments.quiet) as show:
        result = extract_lora(
            arguments.base,
            arguments.model,
            arguments.out,
            rank=arguments.rank,
            energy=arguments.energy,
            noise=arguments.noise,
            embed_lora=arguments.embed_lora,
            fan_in_fan_out=arguments.fan_in_fan_out,
            include=arguments.include,
            exclude=arguments.exclude,
            out_dtype=arguments.out_dtype,
            device=arguments.device,
            progress=show,
        )
    if not arguments.quiet:
        print_result(result)
    return 0
