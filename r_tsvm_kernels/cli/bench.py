"""Measure how fast the kernels and merges are on this machine, after checking them against float64.

  rtsvm bench                          # about three minutes on two cores
  rtsvm bench --device cuda --full --json h200.json
  rtsvm bench --only reweight_prune --only "tsv_merge*"
  rtsvm bench --compare before.json    # what has changed since then?

Our kernels, eager torch and the best version in torch run on the same inputs, with the shapes of public models, in
interleaved rounds. Where mergekit, FusionBench or PEFT is installed, their functions for the same merges take part.
A wrong result is reported and not timed; the exit code is 1 if it is one of ours.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..text import printable
from .terminal import WIDTH, console, say, tell

if TYPE_CHECKING:
    from rich.console import Console

    from ..bench import Row

HELP = "measure speed, memory and accuracy on this machine"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    extent = parser.add_mutually_exclusive_group()
    extent.add_argument("--quick", action="store_true", help="each benchmark on one matrix (default)")
    extent.add_argument("--full", action="store_true", help="many matrices and dtypes: about two hours on two cores")
    extent.add_argument("--dry-run", action="store_true", help="tiny matrices: only shows that everything works")
    parser.add_argument("--device", default="auto", metavar="D", help="auto, cpu, cuda or cuda:INDEX (default auto)")
    parser.add_argument(
        "--only",
        metavar="NAME",
        action="append",
        default=[],
        help="these benchmarks (* for any text), or a group: ops, linalg, merges; repeat",
    )
    parser.add_argument("--json", metavar="FILE", help="write all results here; an existing file is not overwritten")
    parser.add_argument("--plot", metavar="FILE", help="draw the speed-ups (needs matplotlib) into a new file")
    parser.add_argument("--compare", metavar="FILE", help="results of an earlier run, to compare with")


def run(arguments: argparse.Namespace) -> int:
    """Measure and print; return 1 if something of ours is wrong or fails."""
    from ..bench import PLANS, Results, chosen, read_rows, run_suite
    from ..bench.peers import taking_part
    from ..bench.plot import plot, require_matplotlib
    from ..bench.table import legend, result_tables, where
    from ..dispatch import ops, prepare
    from ..engine import choose_device
    from ..errors import OutputExistsError

    # Mistakes in the request are reported before minutes of measuring.
    benchmarks = chosen(arguments.only)
    device = choose_device(arguments.device)
    earlier = read_rows(arguments.compare) if arguments.compare else None
    if arguments.plot:
        require_matplotlib()
        if os.path.lexists(arguments.plot):
            raise OutputExistsError(f"{arguments.plot} exists and is not overwritten: choose another name or remove it")
    prepare(ops(), device.type)  # or kernels would be checked in the middle of measuring
    plan = PLANS["full" if arguments.full else "dry-run" if arguments.dry_run else "quick"]

    results = Results(arguments.json, taking_part(benchmarks))
    with _progress() as progress:
        rows = run_suite(benchmarks, plan, device, results, progress)
    shown = console(width=WIDTH)
    shown.print(where(rows))
    for table in result_tables(rows, shown.width):
        shown.print()
        shown.print(table)
    shown.print()
    shown.print(legend(rows, shown.width))
    for line in _unavailable(rows):
        say(line)
    if earlier is not None:
        _print_comparison(shown, earlier, rows)
    if arguments.plot:
        plot(rows, arguments.plot)
    bad = [row for row in rows if row["notes"].get("status") in ("wrong", "failed")]
    for row in bad:
        what = f"{row['name']}, {row['options']['matrix']} {row['dtype']}, by {row['provider']}"
        tell(f"rtsvm bench: {what}: {row['notes']['status']}: {row['notes']['reason']}")
    return 1 if any(row["role"] == "ours" for row in bad) else 0


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Yield a function that shows what is measured: in one line of a terminal, elsewhere line by line."""
    if not sys.stderr.isatty():
        yield lambda what: tell(f"rtsvm bench: {what}")
        return
    width = shutil.get_terminal_size().columns - 1

    def show(what: str) -> None:
        text = printable(f"measuring {what}" if what else "")
        sys.stderr.write("\r" + text[:width].ljust(width) + ("" if what else "\r"))
        sys.stderr.flush()

    try:
        yield show
    finally:
        show("")


def _unavailable(rows: Sequence[Row]) -> list[str]:
    """Return one line per backend that could not run, with the reason."""
    notes = {(row["provider"], row["notes"]["reason"]) for row in rows if row["notes"].get("status") == "unavailable"}
    return [f"not run: {provider}: {reason}" for provider, reason in sorted(notes)]


def _print_comparison(shown: Console, earlier: Sequence[Row], rows: Sequence[Row]) -> None:
    from ..bench import compare, different_circumstances
    from ..bench.comparison import summary
    from ..bench.table import change_table

    changes, noise = compare([(earlier, rows)])
    shown.print()
    shown.print(change_table(changes))
    say(summary(changes, noise))
    if earlier[0]["sources"] is not None and earlier[0]["sources"] == rows[0]["sources"]:
        say("both runs measured the same sources")
    for line in different_circumstances(earlier, rows):
        say(f"not the same in both runs: {line}")
