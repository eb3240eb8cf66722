"""Turn a fine-tuned model into a LoRA adapter that PEFT reads.

  rtsvm extract-lora --base B --model M --rank 64 OUT
  rtsvm extract-lora --base B --model M --energy 0.95 OUT

Every matrix that the fine-tune changed becomes the truncated SVD of its change. What an adapter cannot express (norms,
biases; embeddings and the output head without --embed-lora) stays the base's. OUT/lora_report.json lists it with the
size of its change.
"""

from __future__ import annotations

import argparse

from .adapters import add_output_arguments, add_rank_arguments, write_adapter

HELP = "turn a fine-tuned model into a LoRA adapter"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--base", metavar="B", required=True, help="base model: folder, .safetensors file or hub id")
    parser.add_argument("--model", metavar="M", required=True, help="the fine-tuned model")
    group = add_rank_arguments(parser, "128, no limit with a rule")
    group.add_argument("--noise", action="store_true", help="count the singular values above the noise edge")
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
    """Extract and print what was captured."""
    from ..lora_tools import extract_lora

    return write_adapter(
        extract_lora,
        arguments,
        arguments.base,
        arguments.model,
        noise=arguments.noise,
        embed_lora=arguments.embed_lora,
        fan_in_fan_out=arguments.fan_in_fan_out,
        include=arguments.include,
        exclude=arguments.exclude,
    )
