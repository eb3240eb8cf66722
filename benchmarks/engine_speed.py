"""Speed of `rtsvm merge` with element-wise methods against `cp` of the same bytes on the same disk.

    python benchmarks/engine_speed.py [--size 4] [--methods linear task_arithmetic] [--rounds 5] [--folder DIR]

A base and two fine-tunes of `--size` GB each are written to DIR and deleted at the end. A merge reads all three and
writes one; it is compared with a copy of two of them, which reads and writes as many bytes in all. `--size 4` wants
24 GB of free disk and, at 1 GB/s, about fifteen minutes for five rounds.

All sides run in turn, round by round; the ratios are those of one round, and their median and quartiles are told. Each
round comes twice, with the inputs in the page cache ("warm") and on disk alone ("cold"). Before each run what the one
before left behind is deleted and the disk is idle (`sync`). A merge is on disk when it ends, so the copy that is held
against it is followed by fsync; plain `cp`, which leaves its bytes in the page cache, is shown beside it.

The time of a merge is that of the whole command, with the start of Python and the import of torch; `in the merge` is
what its report states, without them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from memory import run_measured
from models import Family, evict, family, merge_command, warm
from record import RESULTS, provenance, quartiles, ratios
from rich.console import Console
from rich.table import Table

TASKS = 2  # so that two models are half of what is read and written
COPIES = {"cp": False, "cp and fsync": True}
TARGET = 0.6

Prepare = Callable[[list[Path]], None]
Times = dict[str, list[float]]


def copy(models: list[Path], out: Path, durable: bool) -> float:
    """Copy models with `cp`, and write them back if asked; return the seconds."""
    out.mkdir()
    start = time.perf_counter()
    subprocess.run(["cp", "-r", *map(str, models), str(out)], check=True)
    if durable:
        subprocess.run(["sync", *map(str, out.glob("*/*"))], check=True)
    return time.perf_counter() - start


def timed_round(models: Family, methods: list[str], threads: int | None, prepare: Prepare) -> dict[str, float]:
    """Run every side once; return its seconds, for merges those of the report, too."""
    out = models.base.parent / "out"
    found: dict[str, float] = {}

    def make_ready() -> None:
        shutil.rmtree(out, ignore_errors=True)
        os.sync()
        prepare(models.files)

    for method in methods:
        command = merge_command(models.write_recipe(method), out, threads)
        make_ready()
        found[method] = run_measured(command).seconds
        found[f"{method}, in the merge"] = json.loads((out / "merge_report.json").read_text())["seconds"]
    for side, durable in COPIES.items():
        make_ready()
        found[side] = copy([models.base, models.tuned[0]], out, durable)
    shutil.rmtree(out)
    return found


def measure(models: Family, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Time all sides in turn, warm and cold."""
    caches: dict[str, Prepare] = {"warm": warm, "cold": evict}
    times: dict[str, Times] = {cache: {} for cache in caches}
    for round_ in range(-1, args.rounds):  # round -1 compiles Python's files and fills the caches
        for cache, prepare in caches.items():
            for side, seconds in timed_round(models, args.methods, args.threads, prepare).items():
                if round_ >= 0:
                    times[cache].setdefault(side, []).append(seconds)
            print(f"round {round_}, {cache}: done", file=sys.stderr)
    return {cache: summary(times[cache], args.methods) for cache in caches}


def summary(times: Times, methods: list[str]) -> dict[str, Any]:
    merges = [side for method in methods for side in (method, f"{method}, in the merge")]
    return {
        "seconds": {side: quartiles(values) for side, values in times.items()},
        "speed_by_cp": {side: {copy: ratios(times[copy], times[side]) for copy in COPIES} for side in merges},
    }


def print_table(results: dict[str, Any], moved: float, console: Console) -> None:
    table = Table("inputs", "side", "median", "moved", *(f"speed by that of {copy}" for copy in COPIES))
    for cache, result in results.items():
        for side, q in result["seconds"].items():
            speeds = result["speed_by_cp"].get(side, {}).values()
            table.add_row(
                cache,
                side,
                f"{q['median']:.2f} s",
                f"{moved / q['median'] / 1e9:.2f} GB/s",
                *(f"{s['median']:.2f} ({s['q1']:.2f} - {s['q3']:.2f})" for s in speeds),
            )
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=float, default=4, metavar="GB", help="per model")
    parser.add_argument("--methods", nargs="+", default=["linear", "task_arithmetic"], metavar="METHOD")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--hidden", type=int, default=2048, help="width of the models (default 2048, for 0.5 GB and up)"
    )
    parser.add_argument("--threads", type=int, help="as for rtsvm merge")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where the models are written")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON")
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error("a spread needs at least two rounds")

    with family(args.folder, args.size, TASKS, args.hidden) as models:
        results = measure(models, args)
        moved = (TASKS + 2) * models.checkpoint_bytes
        report = provenance("safetensors") | {
            "tasks": TASKS,
            "hidden": args.hidden,
            "threads_asked": args.threads,
            "checkpoint_bytes": models.checkpoint_bytes,
            "moved_bytes": moved,
            "target_speed_by_cp": TARGET,
            "results": results,
        }
    console = Console()
    console.width = max(console.width, 120)  # a log has no width of its own
    print_table(results, moved, console)
    reached = all(
        result["speed_by_cp"][method]["cp and fsync"]["median"] >= TARGET
        for result in results.values()
        for method in args.methods
    )
    console.print(
        f"{'reached' if reached else '[bold red]MISSED'}: {TARGET:.0%} of the speed of cp and fsync, whole command"
    )
    args.out.mkdir(parents=True, exist_ok=True)
    target = args.out / "engine_speed.json"
    target.write_text(json.dumps(report, indent=1) + "\n")
    console.print(f"written: {target}")
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
