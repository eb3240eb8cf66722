"""Compare the working tree with another commit on this machine, in interleaved runs: `make bench BASE=<commit>`.

    python -m benchmarks.against BASE [--turns 3] [--json FOLDER] [arguments of rtsvm bench]

Both are built from their sources into folders of their own, which are deleted at the end, and run `rtsvm bench` turn by
turn; the side that runs first alternates. The benchmarks that both have are compared. Eager torch and peers, whose code
is the same on both sides, measure the noise: a change is reported where all turns agree and where it is larger than
that. `--json` keeps the results of all turns in a new folder.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import ROOT
from benchmarks.program import WIDTH
from r_tsvm_kernels.bench import Row, compare, different_circumstances, read_rows, row
from r_tsvm_kernels.bench.comparison import summary
from r_tsvm_kernels.bench.table import change_table


def build(sources: Path, target: Path) -> Path:
    """Install the package from its sources into a folder of its own."""
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target"]
    subprocess.run([*install, target, sources], check=True)
    return target


def bench(installed: Path, file: Path, arguments: list[str]) -> list[Row]:
    """Run `rtsvm bench` of an installation; return its rows."""
    command = [sys.executable, "-m", "r_tsvm_kernels", "bench", "--json", str(file), *arguments]
    # Run from another folder, or the working tree would be imported.
    done = subprocess.run(
        command, cwd=file.parent, env=os.environ | {"PYTHONPATH": str(installed)}, stdout=subprocess.DEVNULL
    )
    if not file.exists():
        raise SystemExit(
            f"{installed.name}: `rtsvm bench` ended with exit code {done.returncode}; does that commit have it?"
        )
    report = json.loads(file.read_text())
    return times_of(report) if report["schema"] == 1 else read_rows(file)


def times_of(report: dict[str, Any]) -> list[Row]:
    """Return the times in results of the first schema, which older commits write."""
    machine = {"cpu": report["cpu"], "gpu": report["gpu"], "threads": report["threads"]}
    where = {"date": report["date_utc"], "machine": machine, "versions": report["versions"], "sources": None}
    return [
        where | row(
            found["name"], found["provider"], "time", found["seconds"], role=found["role"], shape=found["shape"],
            dtype=found["dtype"],
            options={"matrix": found["matrix"], "tasks": found["tasks"], "device": report["device"]},
        )
        for found in report["rows"] if found["status"] == "timed"
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="commit to compare with; it must have `rtsvm bench`")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FOLDER", help="keep the results of all turns in this new folder")
    args, passed = parser.parse_known_args()
    commit = subprocess.run(
        ["git", "rev-parse", "--verify", f"{args.base}^{{commit}}"], cwd=ROOT, capture_output=True, text=True
    )
    if commit.returncode != 0 or args.turns < 1:
        parser.error(f"{args.base!r} is not a commit of this repository, or --turns is below 1")
    if args.json:
        args.json.mkdir(parents=True)
    turns = []
    with tempfile.TemporaryDirectory(prefix="rtsvm-bench-") as name:
        folder = Path(name)
        tree, results = folder / "tree", folder / "results"
        results.mkdir()
        subprocess.run(["git", "worktree", "add", "--detach", "-q", tree, commit.stdout.strip()], cwd=ROOT, check=True)
        try:
            before, after = build(tree, folder / "before"), build(ROOT, folder / "after")
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", tree], cwd=ROOT, check=True)
        for turn in range(args.turns):
            found = {}
            for side in (before, after) if turn % 2 == 0 else (after, before):
                found[side] = bench(side, results / f"{side.name}-{turn}.json", passed)
            turns.append((found[before], found[after]))
            print(f"turn {turn + 1} of {args.turns}: done", file=sys.stderr, flush=True)
        if args.json:
            shutil.copytree(results, args.json, dirs_exist_ok=True)
    console = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)
    changes, noise = compare(turns)
    console.print(change_table(changes))
    for line in different_circumstances(*turns[0]):
        console.print(f"not the same for both: {line}")
    console.print(summary(changes, noise))


if __name__ == "__main__":
    main()
