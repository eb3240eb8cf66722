"""``rtsvm mergekit COMMAND``: mergekit's own commands, with our methods and kernels in them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib import import_module

from ..integrations import mergekit
from .terminal import say, tell

HELP = "mergekit's own commands (yaml, pytorch, multi, extract-lora)"
# Our name: the module of mergekit that holds the command ``mergekit-NAME``.
SCRIPTS = {
    "yaml": "mergekit.scripts.run_yaml",
    "pytorch": "mergekit.scripts.merge_raw_pytorch",
    "multi": "mergekit.scripts.multimerge",
    "extract-lora": "mergekit.scripts.extract_lora",
}
NO_ACCELERATE = "--no-accelerate"
USAGE = f"""\
usage: rtsvm mergekit {{{",".join(SCRIPTS)}}} ...

Run mergekit-yaml, mergekit-pytorch, ... with our methods and kernels in
mergekit. All arguments are passed on; {NO_ACCELERATE} adds only the methods."""


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command; all its arguments and options are passed on."""
    add_passing_command(commands, "mergekit", run)


def add_passing_command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    run: Callable[[argparse.Namespace], int],
) -> None:
    """Add a command that passes all its arguments to another library's command."""
    # No character begins an option here: `--help` and all others belong to the other library.
    command = commands.add_parser(name, prefix_chars="\0", add_help=False)
    command.add_argument("arguments", nargs=argparse.REMAINDER)
    command.set_defaults(run=run)


def exit_code(end: SystemExit) -> int:
    """Return the exit code of a command that ended with SystemExit."""
    return end.code if isinstance(end.code, int) else int(end.code is not None)


def run(arguments: argparse.Namespace) -> int:
    """Install our backend in this process, and run mergekit's command."""
    name, *rest = arguments.arguments or [""]
    if name in ("-h", "--help"):
        for line in USAGE.splitlines():
            say(line)
        return 0
    if name not in SCRIPTS:
        tell(USAGE.partition("\n")[0])
        tell(f"rtsvm mergekit: error: expected one of {', '.join(SCRIPTS)}, got {name or 'nothing'}")
        return 2
    mergekit.install(accelerate=NO_ACCELERATE not in rest)
    try:
        command = import_module(SCRIPTS[name]).main
        command.main([item for item in rest if item != NO_ACCELERATE], prog_name=f"rtsvm mergekit {name}")
    except SystemExit as end:
        return exit_code(end)
    finally:
        mergekit.uninstall()
    return 0
