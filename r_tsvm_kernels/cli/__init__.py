"""The command ``rtsvm``. Each subcommand is one file; nothing heavy is imported before one runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .. import __version__
from ..errors import RTsvmError
from . import info, inspect, merge


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the whole command line."""
    parser = argparse.ArgumentParser(prog="rtsvm", description="Merge fine-tuned models, exactly and fast.")
    parser.add_argument("--version", action="version", version=f"rtsvm {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in (merge, inspect, info):
        name = module.__name__.rpartition(".")[2]
        command = commands.add_parser(
            name, help=module.HELP, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 0 (done), 2 (wrong use) or 1 (failed)."""
    arguments = build_parser().parse_args(argv)
    try:
        code: int = arguments.run(arguments)
    except RTsvmError as error:
        print(f"rtsvm {arguments.command}: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"rtsvm {arguments.command}: interrupted; nothing was written", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output left, e.g. `rtsvm inspect | head`.
        sys.stderr.close()
        return 1
    return code
