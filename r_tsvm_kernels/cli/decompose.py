"""Decompose models once, for merges with any weights.

For tsvm, rtsvm, star and core_space the merged update is linear in the weights of the models. PARTS is a folder that
gets the summand of each model; `rtsvm merge --parts PARTS --weight NAME=W --set alpha=A OUT` then merges at the speed
of task arithmetic, as often as you like. The models are given as to `rtsvm merge`; their weights and alpha are only
defaults of later merges.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from .adapters import print_result
from .progress import shown_progress
from .recipe import DTYPES, add_recipe_arguments, make_config
from .resources import add_resource_arguments, chosen_backends
from .terminal import say

if TYPE_CHECKING:
    from ..config import MergeConfig
    from ..engine import CheckpointResult
    from ..parts_folder import PartsFolder

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
    parser.add_argument("--embed-lora", action="store_true", help="adapt embeddings and the output head too")
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
    if len(arguments.paths) == 1 and arguments.paths[0].endswith((".yaml", ".yml")) and not arguments.model:
        raise ConfigError(
            f"no output: name a folder after the recipe, as in `rtsvm decompose {arguments.paths[0]} PARTS`"
        )
    recipe, out = (None, *arguments.paths) if len(arguments.paths) == 1 else arguments.paths
    config = make_config(arguments, recipe)
    if arguments.as_lora:
        return _write_adapters(arguments, config, Path(out))
    if arguments.lora_rank is not None or arguments.embed_lora:
        raise ConfigError("--lora-rank and --embed-lora are for --as-lora")
    result = _decompose(arguments, config, Path(out))
    if not arguments.quiet:
        from ..plan import tasks_of

        before = f" ({result.resumed} were finished before)" if result.resumed else ""
        count = f"parts of {len(result.reports)} tensors{before}"
        say(f"{config.method.pretty_name}: {count} in {result.seconds:.1f} s -> {out}")
        options = [out, "--weight", f"{tasks_of(config)[0].name}=0.5", "--set", "alpha=1.0", "OUT"]
        say(f"to merge them: rtsvm merge --parts {shlex.join(options)}")
    return 0


def _decompose(arguments: argparse.Namespace, config: MergeConfig, out: Path) -> CheckpointResult:
    from ..engine import choose_device, decompose_checkpoints

    backends = chosen_backends(arguments.backend, choose_device(arguments.device))
    with shown_progress(arguments.quiet) as show, backends:
        return decompose_checkpoints(
            config,
            out,
            dense_above=0 if arguments.dense else None,
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


def _write_adapters(arguments: argparse.Namespace, config: MergeConfig, out: Path) -> int:
    """Decompose into a hidden folder beside OUT, write the adapters from there, and print what they keep."""
    from ..engine.output import is_single_file, locked_stage, refuse_existing, writing
    from ..errors import ConfigError, OutputUnfinishedError
    from ..files import publish
    from ..lora import rank_of
    from ..lora_tools import parts_to_lora
    from ..parts_folder import PartsFolder, is_parts

    rank_of((1, 1), arguments.lora_rank, None, False)  # refuse values out of range before anything is read
    if is_single_file(out):
        raise ConfigError(f"{out}: adapters are folders; choose a name that does not end in .safetensors")
    with locked_stage(out) as stage:
        if stage.folder.exists():
            raise OutputUnfinishedError(f"{out}: holds a stopped merge; resume that, or choose another output")
        parts = out.with_name(f".{out.name}.parts")
        if is_parts(parts) and arguments.restart:
            shutil.rmtree(parts)
        if not is_parts(parts):
            _decompose(arguments, config, parts)
        elif arguments.resume:
            _require_same(config, PartsFolder.open(parts), out)
        else:
            raise OutputUnfinishedError(
                f"{out}: holds a stopped decomposition; continue it with --resume, or delete it with --restart"
            )
        waiting = parts / "adapters"
        shutil.rmtree(waiting, ignore_errors=True)  # of a command that was stopped
        with shown_progress(arguments.quiet) as show:
            results = parts_to_lora(
                parts,
                waiting,
                base=config.base_model,
                rank=arguments.lora_rank,
                embed_lora=arguments.embed_lora,
                device=arguments.device,
                progress=show,
            )
        with writing(out):
            refuse_existing(out)
            publish(waiting, out)
            shutil.rmtree(parts)
    for name, result in results.items() if not arguments.quiet else ():
        print_result(replace(result, path=out / name, report_path=out / name / result.report_path.name))
    return 0


def _require_same(config: MergeConfig, folder: PartsFolder, out: Path) -> None:
    """Check that the parts of a stopped command are those of its recipe.

    Raises:
        ResumeRefusedError: they are not.
    """
    from ..errors import ConfigError, ResumeRefusedError
    from ..parts import check_recipe

    try:
        check_recipe(config, folder)
    except ConfigError as error:
        raise ResumeRefusedError(f"{out}: {error}; or start over with --restart") from error
    if folder.recipe.get("base_model") != config.base_model:
        raise ResumeRefusedError(
            f"{out}: what was stopped has the base {folder.recipe.get('base_model')}, not {config.base_model}; "
            "start over with --restart"
        )
