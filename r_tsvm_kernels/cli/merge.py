"""Merge fine-tuned models into one.

  rtsvm merge recipe.yaml OUT
  rtsvm merge --base B --model A --model C --method rtsvm --set density=0.3 OUT

Models are Hugging Face folders (one file or sharded) or bare .safetensors files. OUT is a folder that does not exist
yet, or a path ending in .safetensors. The recipe is mergekit's YAML.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from .recipe import add_recipe_arguments, make_config

if TYPE_CHECKING:
    from ..engine import Progress

HELP = "merge models into one"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("paths", metavar="[RECIPE.yaml] OUT", nargs="+", help="recipe file (if any) and output")
    add_recipe_arguments(parser)
    group = parser.add_argument_group("how to run")
    group.add_argument("--device", default="auto", metavar="D", help="auto, cpu, cuda or cuda:INDEX (default auto)")
    group.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all cores)")
    group.add_argument("--quiet", action="store_true", help="print errors only")


def run(arguments: argparse.Namespace) -> int:
    """Merge and say where the result lies."""
    from ..errors import ConfigError

    if len(arguments.paths) > 2:
        raise ConfigError(f"expected [RECIPE.yaml] OUT, got {len(arguments.paths)} paths: {' '.join(arguments.paths)}")
    recipe, out = (None, *arguments.paths) if len(arguments.paths) == 1 else arguments.paths
    config = make_config(arguments, recipe)

    from ..engine import merge_checkpoints

    with _progress(arguments.quiet) as show:
        result = merge_checkpoints(
            config,
            out,
            device=arguments.device,
            threads=arguments.threads,
            shard_size=arguments.shard_size,
            progress=show,
        )
    if not arguments.quiet:
        print(f"{config.method.pretty_name}: {len(result.reports)} tensors in {result.seconds:.1f} s -> {result.path}")
        print(f"report: {result.report_path}")
    return 0


@contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[Progress], None] | None]:
    """Show a bar on a terminal, a plain line every few seconds elsewhere, nothing if quiet."""
    if quiet:
        yield None
    elif sys.stderr.isatty():
        with _bar() as show:
            yield show
    else:
        yield _PlainLines()


@contextmanager
def _bar() -> Iterator[Callable[[Progress], None]]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.fields[done]}/{task.fields[count]} tensors"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}", style="dim"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("reading headers", total=None, done=0, count="?")

        def show(state: object) -> None:
            from ..engine import Progress as State

            assert isinstance(state, State)
            bar.update(
                task,
                description=state.tensor,
                completed=state.bytes_done,
                total=state.bytes_total,
                done=state.tensors_done,
                count=state.tensors_total,
            )

        yield show


class _PlainLines:
    """One line every few seconds, and one for the last tensor."""

    INTERVAL = 5.0

    def __init__(self) -> None:
        self.start = self.last = time.monotonic()

    def __call__(self, state: Progress) -> None:
        now = time.monotonic()
        if now - self.last < self.INTERVAL and state.tensors_done < state.tensors_total:
            return
        self.last = now
        elapsed = now - self.start
        left = elapsed * (state.bytes_total / state.bytes_done - 1) if state.bytes_done else 0.0
        print(
            f"{state.tensors_done}/{state.tensors_total} tensors, "
            f"{state.bytes_done / 1e6:.1f}/{state.bytes_total / 1e6:.1f} MB, {left:.0f} s left: {state.tensor}",
            file=sys.stderr,
            flush=True,
        )
