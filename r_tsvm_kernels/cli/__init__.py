"""The command ``rtsvm``. Each subcommand is one file; nothing heavy is imported before one runs."""

from __future__ import annotations

import argparse
import os
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress

from .. import __version__
from ..errors import RTsvmError
from . import (
    bench,
    extract_lora,
    fusion_bench,
    info,
    inspect,
    merge,
    merge_lora,
    mergekit,
    report,
    resize_lora,
    verify,
)
from .signals import Terminated, sigterm_raises


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the whole command line."""
    parser = argparse.ArgumentParser(prog="rtsvm", description="Merge fine-tuned models, exactly and fast.")
    parser.add_argument("--version", action="version", version=f"rtsvm {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in (merge, inspect, verify, report, info, bench, extract_lora, resize_lora, merge_lora):
        name = module.__name__.rpartition(".")[2].replace("_", "-")
        command = commands.add_parser(
            name, help=module.HELP, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    mergekit.add_commands(commands)
    fusion_bench.add_commands(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 0 (done), 2 (wrong use), 1 (failed), 130 (SIGINT) or 143 (SIGTERM)."""
    code = _run(build_parser().parse_args(argv))
    # A merge that was stopped in the middle of a decomposition leaves this thread of the engine, which Python would
    # wait for. All that counts is on disk.
    if any(thread.name == "rtsvm-merge" for thread in threading.enumerate()):
        with suppress(OSError, ValueError):  # nobody reads our output any more
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    return code


def _run(arguments: argparse.Namespace) -> int:
    try:
        with sigterm_raises():
            code: int = arguments.run(arguments)
    except RTsvmError as error:
        print(f"rtsvm {arguments.command}: error: {error}", file=sys.stderr)
        return error.exit_code
    except (KeyboardInterrupt, Terminated) as stop:
        # A merge that can be continued says so.
        print(f"rtsvm {arguments.command}: stopped; {str(stop) or 'nothing was written'}", file=sys.stderr)
        return 143 if isinstance(stop, Terminated) else 130
    except BrokenPipeError:
        # The reader of our output left, e.g. `rtsvm inspect | head`.
        sys.stderr.close()
        return 1
    return code
