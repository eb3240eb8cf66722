"""``rtsvm mergekit-yaml`` and its like: mergekit's own commands, with our methods and kernels in them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib import import_module

from ..integrations import mergekit

# Our command: the module of mergekit that holds the one of the same name.
SCRIPTS = {
    "mergekit-yaml": "mergekit.scripts.run_yaml",
    "mergekit-pytorch": "mergekit.scripts.merge_raw_pytorch",
    "mergekit-multi": "mergekit.scripts.multimerge",
    "mergekit-extract-lora": "mergekit.scripts.extract_lora",
}
NO_ACCELERATE = "--no-accelerate"


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add one command for each of mergekit's; all its arguments and options are passed on."""
    for name in SCRIPTS:
        add_command(commands, name, name, run)


def add_command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    theirs: str,
    run: Callable[[argparse.Namespace], int],
) -> None:
    """Add one command that passes everything on to another library's command, `theirs`."""
    help_text = f"run {theirs} with our methods and kernels ({NO_ACCELERATE}: only the methods)"
    # Nothing begins an option here: `--help` and all others belong to the other library.
    command = commands.add_parser(name, help=help_text, prefix_chars="\0", add_help=False)
    command.add_argument("arguments", nargs=argparse.REMAINDER)
    command.set_defaults(run=run)


def exit_code(end: SystemExit) -> int:
    """Return the exit code of a command that ended so, whether it went well or not."""
    return end.code if isinstance(end.code, int) else int(end.code is not None)


def run(arguments: argparse.Namespace) -> int:
    """Install our backend in this process, and run mergekit's command."""
    rest = [argument for argument in arguments.arguments if argument != NO_ACCELERATE]
    mergekit.install(accelerate=NO_ACCELERATE not in arguments.arguments)
    try:
        command = import_module(SCRIPTS[arguments.command]).main
        command.main(rest, prog_name=f"rtsvm {arguments.command}")
    except SystemExit as end:
        return exit_code(end)
    finally:
        mergekit.uninstall()
    return 0
