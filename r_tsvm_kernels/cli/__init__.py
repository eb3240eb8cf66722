"""The command ``rtsvm``. Each subcommand is one file; nothing heavy is imported before one runs."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
import threading
from collections.abc import Sequence
from typing import Any, NoReturn

from .. import __version__
from ..errors import RtsvmError
from ..text import printable
from . import (
    bench,
    decompose,
    extract_lora,
    fusion_bench,
    info,
    inspect,
    merge,
    merge_lora,
    mergekit,
    push,
    report,
    resize_lora,
    selfcheck,
    sweep,
    verify,
)
from .signals import Terminated, sigterm_raises
from .terminal import standard_streams, tell, told_warnings

# Commands that print their result, which is lost if stdout is closed. The others write theirs to disk.
_PRINTING = ("inspect", "verify", "info", "selfcheck", "bench")
# Messages of torch and Python, in exceptions of general classes, when the system refuses memory or threads.
_EXHAUSTED = ("can't allocate memory", "not enough memory", "out of memory", "can't start new thread")


# Titles of the overview, with the modules of their commands.
_GROUPS: dict[str, tuple[Any, ...]] = {
    "merging": (merge, sweep, decompose, inspect, verify, report, push),
    "LoRA adapters": (extract_lora, resize_lora, merge_lora),
    "inside other tools": (mergekit, fusion_bench),
    "this machine": (info, selfcheck, bench),
}


class _HelpFormatter(argparse.HelpFormatter):
    """Wrap prose to the width of the terminal; keep paragraphs with indented lines, which are commands and tables."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = (paragraph.strip("\n") for paragraph in text.split("\n\n"))
        return "\n\n".join(
            paragraph
            if any(line.startswith(" ") for line in paragraph.splitlines())
            else super(_HelpFormatter, self)._fill_text(paragraph, width, indent)
            for paragraph in paragraphs
        )


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        super().error(printable(message))

    def refuse(self, unknown: Sequence[str]) -> NoReturn:
        """End with the usage of the command and the option that may be meant by the first unknown argument."""
        option = unknown[0].partition("=")[0]
        similar = difflib.get_close_matches(option, self._option_string_actions, n=1)
        hint = f"; did you mean {similar[0]}?" if similar else ""
        self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")


def build_parser(only: str | None = None) -> _Parser:
    """Build the parser of the whole command line, or with the arguments of one command only, which is faster."""
    parser = _Parser(
        prog="rtsvm",
        usage="rtsvm COMMAND ...",
        description="Merge fine-tuned models, exactly and fast.",
        epilog=_overview(),
        formatter_class=_HelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"rtsvm {__version__}")
    commands = parser.add_subparsers(dest="command", prog="rtsvm", metavar="COMMAND", help=argparse.SUPPRESS)
    for modules in _GROUPS.values():
        for module in modules:
            if hasattr(module, "add_command"):  # passes everything on to another library
                module.add_command(commands)
            else:
                _add_command(commands, module, only in (None, _name(module)))
    return parser


def _add_command(commands: argparse._SubParsersAction[_Parser], module: Any, with_arguments: bool) -> None:
    command = commands.add_parser(
        _name(module),
        usage=getattr(module, "USAGE", None),
        description=module.__doc__,
        formatter_class=_HelpFormatter,
    )
    if with_arguments:
        module.add_arguments(command)
    command.set_defaults(run=module.run, parser=command)


def _name(module: Any) -> str:
    name: str = module.__name__.rpartition(".")[2]
    return name.replace("_", "-")


def _overview() -> str:
    """Return the overview of the commands, grouped by purpose."""
    lines = []
    for title, modules in _GROUPS.items():
        lines += [f"{title}:", *(f"  {_name(module):<14}{module.HELP}" for module in modules), ""]
    return "\n".join([*lines, "rtsvm COMMAND --help explains a command."])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 0 (done), 2 (wrong use), 1 (failed), 130 (SIGINT) or 143 (SIGTERM).

    A closed stream stops no command. Commands that print their result then return 1.
    """
    with standard_streams() as (out, _):
        words = sys.argv[1:] if argv is None else argv
        names = {_name(module) for modules in _GROUPS.values() for module in modules}
        parser = build_parser(words[0] if words and words[0] in names else None)
        arguments, unknown = parser.parse_known_args(argv)
        if hasattr(arguments, "paths") and not any(word.startswith("-") for word in unknown):
            arguments.paths += unknown  # argparse leaves those after further options: RECIPE --parts PARTS OUT
            unknown = []
        if unknown:
            command: _Parser = getattr(arguments, "parser", parser)
            command.refuse(unknown)
        if arguments.command is None:
            parser.print_help()
            return 0
        code = _run(arguments)
        out.flush()
        if out.error is not None and arguments.command in _PRINTING:
            code = code or 1
            if not isinstance(out.error, BrokenPipeError):  # the reader closed the pipe, as `head` does: no error
                tell(f"rtsvm {arguments.command}: error: stdout cannot be written: {out.error.strerror}")
    # A merge that was stopped in the middle of a decomposition leaves this thread of the engine, which Python would
    # wait for. Everything needed is on disk.
    if any(thread.name == "rtsvm-merge" for thread in threading.enumerate()):
        os._exit(code)
    return code


def _run(arguments: argparse.Namespace) -> int:
    try:
        with sigterm_raises(), told_warnings(getattr(arguments, "quiet", False)):
            code: int = arguments.run(arguments)
    except RtsvmError as error:
        tell(f"rtsvm {arguments.command}: error: {error}")
        return error.exit_code
    except (KeyboardInterrupt, Terminated) as stop:
        # A merge that can be continued says so.
        tell(f"rtsvm {arguments.command}: stopped; {str(stop) or 'nothing was written'}")
        return 143 if isinstance(stop, Terminated) else 130
    except (OSError, MemoryError, RuntimeError) as error:
        reason = _refused_by_the_system(error)
        if reason is None:
            raise
        tell(f"rtsvm {arguments.command}: error: {reason}")
        return 1
    return code


def _refused_by_the_system(error: Exception) -> str | None:
    """Return what the system refused; None for any other error, which is a mistake of ours."""
    if isinstance(error, OSError):
        return f"{error.filename or 'the system refused'}: {error.strerror or error}"
    if isinstance(error, MemoryError) or any(words in str(error) for words in _EXHAUSTED):
        reason = str(error).partition("\n")[0] or "no memory is left"
        return f"{reason}; use fewer --threads or a lower --memory; --resume continues a stopped merge"
    return None
