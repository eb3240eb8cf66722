"""Decompose models once, for merges with any weights.

For tsvm, rtsvm, star and core_space the merged update is linear in the weights of the models. PARTS is a folder that
gets the summand of each model; `rtsvm merge --parts PARTS --weight NAME=W --set alpha=A OUT` then merges at the speed
of task arithmetic, as often as you like. The models are given as to `rtsvm merge`; their weights and alpha are only
defaults of later merges.
"""

from __future__ import annotations

import argparse
import shutil
from dataclasses import replace
from pathlib import Path

from .adapters import print_result
from .progress import shown_progress
from .recipe import DTYPES, add_recipe_arguments, make_config
from .resources import add_resource_arguments, chosen_backends
from .terminal import say

HELP = "decompose models once, for merges with any weights"
USAGE = """\
rtsvm decompose [options] RECIPE.yaml PARTS
       rtsvm decompose [options] --base B --model A [--model C ...] PARTS"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("paths", metavar="[RECIPE.yaml] PARTS", nargs="+", help="recipe file (if any) and output")
    parser.add_argument(
        "--dense", action="store_true", help="store matrices, not factors: merges read more and compute less"
    )
    parser.add_argument(
        "--store-dtype", choices=DTYPES, help="dtype of the parts (default: float32, or bfloat16 with mode=fast)"
    )
    parser.add_argument(
        "--as-lora",
        action="store_true",
        help="write LoRA adapters for PEFT, PARTS/NAME of each model, instead of parts",
    )
    parser.add_argument("--lora-rank", type=int, metavar="N", help="largest rank of adapters (default: the parts')")
    add_recipe_arguments(parser)
    group = add_resource_arguments(parser)
    stopped = group.add_mutually_exclusive_group()
    stopped.add_argument("--resume", action="store_true", help="continue a decomposition into PARTS that was stopped")
    stopped.add_argument("--restart", action="store_true", help="delete what such a one has left, and start over")
    group.add_argument("--quiet", action="store_true", help="print errors only")


def run(arguments: argparse.Namespace) -> int:
    """Decompose and print where the parts are."""
    from ..errors import ConfigError

    if len(arguments.paths) > 2:
        raise ConfigError(
            f"expected [RECIPE.yaml] PARTS, got {len(arguments.paths)} paths: {' '.join(arguments.paths)}"
        )
    recipe, out = (None, *arguments.paths) if len(arguments.paths) == 1 else arguments.paths
    config = make_config(arguments, recipe)

    from ..engine import choose_device, decompose_checkpoints
    from ..engine.output import refuse_existing
    from ..parts_folder import is_parts
    from ..plan import tasks_of

    if arguments.lora_rank is not None and not arguments.as_lora:
        raise ConfigError("--lora-rank is for --as-lora")
    target = Path(out)
    if arguments.as_lora:  # the parts are only on the way
        refuse_existing(target)
        target = target.with_name(f"{target.name}.parts")
        if is_parts(target) and arguments.resume:
            return _write_adapters(arguments, target, Path(out))
    backends = chosen_backends(arguments.backend, choose_device(arguments.device))
    with shown_progress(arguments.quiet) as show, backends:
        result = decompose_checkpoints(
            config,
            target,
            dense=arguments.dense,
            store_dtype=arguments.store_dtype,
            device=arguments.device,
            threads=arguments.threads,
            memory=arguments.memory,
            device_memory=arguments.device_memory,
            allow_pickle=arguments.allow_pickle,
            resume=arguments.resume,
            restart=arguments.restart,
            progress=show,
        )
    if arguments.as_lora:
        return _write_adapters(arguments, target, Path(out))
    if not arguments.quiet:
        before = f" ({result.resumed} were finished before)" if result.resumed else ""
        count = f"parts of {len(result.reports)} tensors{before}"
        say(f"{config.method.pretty_name}: {count} in {result.seconds:.1f} s -> {out}")
        names = [task.name for task in tasks_of(config)]
        say(f"to merge them: rtsvm merge --parts {out} --weight {names[0]}=0.5 --set alpha=1.0 OUT")
    return 0


def _write_adapters(arguments: argparse.Namespace, parts: Path, out: Path) -> int:
    """Write the adapters, remove the parts, and print what the adapters keep."""
    from ..lora_tools import parts_to_lora

    waiting = parts / "adapters"
    shutil.rmtree(waiting, ignore_errors=True)  # of a command that was stopped
    with shown_progress(arguments.quiet) as show:
        results = parts_to_lora(parts, waiting, rank=arguments.lora_rank, device=arguments.device, progress=show)
    waiting.rename(out)
    shutil.rmtree(parts)
    for name, result in results.items() if not arguments.quiet else ():
        print_result(replace(result, path=out / name, report_path=out / name / result.report_path.name))
    return 0
