"""Merge fine-tuned models into one.

Models are Hugging Face folders (one file or sharded), .safetensors files or Hugging Face ids (org/name@revision); also
PEFT LoRA adapters: of the base, or of another model, written model+adapter. OUT is a folder that does not exist yet, or
a path ending in .safetensors. The recipe is mergekit's YAML. The same command with --resume continues a merge that was
stopped.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from . import push
from .progress import shown_progress
from .recipe import add_recipe_arguments, make_config
from .resources import add_resource_arguments, chosen_backends
from .terminal import say

HELP = "merge models into one"
USAGE = """\
rtsvm merge [options] RECIPE.yaml OUT
       rtsvm merge [options] --base B --model A [--model C ...] OUT"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("paths", metavar="[RECIPE.yaml] OUT", nargs="+", help="recipe file (if any) and output")
    add_recipe_arguments(parser)
    group = add_resource_arguments(parser)
    group.add_argument(
        "--engine", choices=("local", "ray"), default="local", help="ray: several GPUs or machines (default local)"
    )
    group.add_argument("--ray-address", metavar="A", help="a running Ray cluster (default: Ray on this machine alone)")
    stopped = group.add_mutually_exclusive_group()
    stopped.add_argument("--resume", action="store_true", help="continue a merge into OUT that was stopped")
    stopped.add_argument("--restart", action="store_true", help="delete what such a merge has left, and start over")
    group.add_argument(
        "--norms", action="store_true", help="report norms for element-wise methods too, which is slower"
    )
    group.add_argument("--steps", metavar="DIR", help="keep the outputs of a recipe's named documents in DIR")
    group.add_argument("--quiet", action="store_true", help="print errors only")
    hub = parser.add_argument_group("the Hugging Face hub")
    hub.add_argument("--push-to-hub", metavar="USER/NAME", help="upload the merge when it is complete")
    hub.add_argument("--private", action="store_true", help="make a new repository private")
    hub.add_argument("--push-dry-run", action="store_true", help="list what would be uploaded, and upload nothing")


def run(arguments: argparse.Namespace) -> int:
    """Merge and print where the result is."""
    from ..errors import ConfigError

    if len(arguments.paths) > 2:
        raise ConfigError(f"expected [RECIPE.yaml] OUT, got {len(arguments.paths)} paths: {' '.join(arguments.paths)}")
    if len(arguments.paths) == 1 and arguments.paths[0].endswith((".yaml", ".yml")) and not arguments.model:
        raise ConfigError(f"no output: name a folder after the recipe, as in `rtsvm merge {arguments.paths[0]} OUT`")
    recipe, out = (None, *arguments.paths) if len(arguments.paths) == 1 else arguments.paths
    config = make_config(arguments, recipe)

    from ..engine import choose_device, merge_checkpoints
    from ..engine.output import is_single_file, page_path
    from ..engine.push import check_target
    from ..system import return_large_blocks

    if arguments.push_to_hub is None and (arguments.private or arguments.push_dry_run):
        raise ConfigError("--private and --push-dry-run are for --push-to-hub USER/NAME")
    if arguments.push_to_hub is not None:  # before the work
        if is_single_file(Path(out)):
            raise ConfigError(f"{out}: a single file has no model card; to push it, merge into a folder")
        check_target(arguments.push_to_hub, log_in=not arguments.push_dry_run)

    backends = chosen_backends(arguments.backend, choose_device(arguments.device))
    return_large_blocks()
    with shown_progress(arguments.quiet) as show, backends:
        result = merge_checkpoints(
            config,
            out,
            device=arguments.device,
            threads=arguments.threads,
            memory=arguments.memory,
            device_memory=arguments.device_memory,
            shard_size=arguments.shard_size,
            allow_pickle=arguments.allow_pickle,
            resume=arguments.resume,
            restart=arguments.restart,
            engine=arguments.engine,
            ray_address=arguments.ray_address,
            measure_norms=True if arguments.norms else None,
            progress=show,
            steps=arguments.steps,
        )
    if not arguments.quiet:
        before = f" ({result.resumed} were finished before)" if result.resumed else ""
        count = f"{len(result.reports)} tensors{before}"
        say(f"{config.method.pretty_name}: {count} in {result.seconds:.1f} s -> {result.path}")
        overlaps = [value for report in result.reports.values() for value in report.interference]
        if overlaps:
            share = round(sum(overlaps) / len(overlaps), 2) + 0.0  # -0.0 becomes 0.0
            say(f"interference: {share:.2f} on average (0: independent tasks, 1: the same subspaces)")
        rounded = [report for report in result.reports.values() if report.rounding_norm is not None]
        if rounded:
            change = math.hypot(*(report.rounding_norm or 0.0 for report in rounded))
            whole = math.hypot(*(report.weight_norm or 0.0 for report in rounded))
            say(f"rounding to FP8 changed {len(rounded)} weights by {100 * change / (whole or 1):.2g} % (norms)")
        chosen = sum(bool(entry.certificate and entry.certificate.arbitrary) for entry in result.reports.values())
        if chosen:
            say(f"arbitrary choice among equal singular values in {chosen} tensors: see the report")
        say(f"report: {page_path(result.path)}; to check the files later: rtsvm verify {result.path}")
    if arguments.push_to_hub is not None:
        push.upload(out, arguments.push_to_hub, private=arguments.private, dry_run=arguments.push_dry_run)
    return 0
