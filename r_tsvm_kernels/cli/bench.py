"""Measure how fast the kernels and merges are on this machine, after checking them against float64.

  rtsvm bench                                  # about two minutes on two cores
  rtsvm bench --device cuda --full --json h200.json
  rtsvm bench --only reweight_prune --only "tsv_merge*"
  rtsvm bench --compare before.json            # what has changed since then?

Every way to a result (our kernels, eager torch, the best of torch) runs on the same inputs, of the shapes of public
models, in turn with the others. Where mergekit, FusionBench or PEFT is installed, so do their functions for the same
merges. One whose result is wrong is named and not timed; the exit code is 1 if it is ours.
"""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, Any

from .terminal import console, say, tell

if TYPE_CHECKING:
    from rich.console import Console

HELP = "measure speed, memory and accuracy on this machine"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    extent = parser.add_mutually_exclusive_group()
    extent.add_argument("--quick", action="store_true", help="each benchmark on one matrix (default)")
    extent.add_argument("--full", action="store_true", help="many matrices and dtypes: more than an hour on two cores")
    extent.add_argument("--dry-run", action="store_true", help="tiny matrices: shows that everything works, no more")
    parser.add_argument("--device", default="auto", metavar="D", help="auto, cpu, cuda or cuda:INDEX (default auto)")
    parser.add_argument(
        "--only",
        metavar="NAME",
        action="append",
        default=[],
        help="these benchmarks (* for any text), or a group: ops, linalg, merges; repeat",
    )
    parser.add_argument("--json", metavar="FILE", help="write all results here; an existing file is not overwritten")
    parser.add_argument("--plot", metavar="FILE", help="draw the speed-ups (needs matplotlib); not overwritten either")
    parser.add_argument("--compare", metavar="FILE", help="results of an earlier run, to compare with")


def run(arguments: argparse.Namespace) -> int:
    """Measure and print; return 1 if something of ours is wrong or fails."""
    from ..bench import PLANS, ResultFile, chosen, read_report, run_suite
    from ..bench.table import legend, plot, require_matplotlib, result_table
    from ..engine import choose_device
    from ..errors import OutputExistsError

    # Whatever is wrong with the request is told before minutes of measuring.
    benchmarks = chosen(arguments.only)
    device = choose_device(arguments.device)
    earlier = read_report(arguments.compare) if arguments.compare else None
    if arguments.plot:
        require_matplotlib()
        if os.path.lexists(arguments.plot):
            raise OutputExistsError(f"{arguments.plot} exists and is not overwritten: choose another name or remove it")
    plan = PLANS["full" if arguments.full else "dry-run" if arguments.dry_run else "quick"]
    file = ResultFile(arguments.json) if arguments.json else None

    report = run_suite(benchmarks, plan, device, file.write if file else lambda report: None, _say)
    shown = console(width=180)
    shown.print(result_table(report))
    shown.print(legend(report))
    for line in _unavailable(report):
        say(line)
    if earlier is not None:
        _print_comparison(shown, earlier, report)
    if arguments.plot:
        plot(report, arguments.plot)
    bad = [row for row in report["rows"] if row["status"] in ("wrong", "failed")]
    for row in bad:
        what = f"{row['name']}, {row['matrix']} {row['dtype']}, by {row['provider']}"
        tell(f"rtsvm bench: {what}: {row['status']}: {row['reason']}")
    return 1 if any(row["role"] == "ours" for row in bad) else 0


def _say(what: str) -> None:
    tell(f"rtsvm bench: {what}")


def _unavailable(report: dict[str, Any]) -> list[str]:
    """Return one line per backend that could not run, with its reason."""
    reasons = {(row["provider"], row["reason"]) for row in report["rows"] if row["status"] == "unavailable"}
    return [f"not run: {provider}: {reason}" for provider, reason in sorted(reasons)]


def _print_comparison(shown: Console, earlier: dict[str, Any], report: dict[str, Any]) -> None:
    from ..bench import compare, different_circumstances
    from ..bench.table import change_table

    changes = compare(earlier, report)
    shown.print(change_table(changes))
    marked = sum(bool(change.verdict) for change in changes)
    say(f"{len(changes)} rows in both, {marked} changed beyond noise (quartiles apart, and by more than 5 %)")
    for line in different_circumstances(earlier, report):
        say(f"not the same in both runs: {line}")
