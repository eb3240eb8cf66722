"""``rtsvm fusion-bench``: FusionBench's own command, with our configurations and our solvers in it."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module

from ..integrations import fusion_bench
from .mergekit import NO_ACCELERATE, add_passing_command, exit_code

HELP = "FusionBench's own command, with our configurations and solvers"
NAME = "fusion-bench"
SEARCH = "hydra.searchpath=["


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command; all its arguments are passed on."""
    add_passing_command(commands, NAME, run)


def run(arguments: argparse.Namespace) -> int:
    """Install our backend in this process, and run FusionBench's command with our configurations on its search path."""
    fusion_bench.INSTALLATION.version()  # raises if there is none
    rest = [argument for argument in arguments.arguments if argument != NO_ACCELERATE]
    paths = [argument[len(SEARCH) :].removesuffix("]") for argument in rest if argument.startswith(SEARCH)]
    rest = [argument for argument in rest if not argument.startswith(SEARCH)]
    if NO_ACCELERATE not in arguments.arguments:
        fusion_bench.install()
    before = sys.argv
    sys.argv = [f"rtsvm {NAME}", f"{SEARCH}{','.join([fusion_bench.SEARCH_PATH, *paths])}]", *rest]
    try:
        import_module("fusion_bench.scripts.cli")._hydra_main()
    except SystemExit as end:
        return exit_code(end)
    finally:
        sys.argv = before
        fusion_bench.uninstall()
    return 0
