"""Compare the working tree with another commit, on this machine, in turns: `make bench BASE=<commit>`.

    python benchmarks/against.py BASE [--turns 3] [--out FILE] [arguments of rtsvm bench]

Both are built from their sources into folders of their own, which are deleted at the end, and run `rtsvm bench` one
after the other, turn by turn; who is first alternates. Rows of torch and of peers, whose code is the same in both,
measure the noise: a change of ours is told where all turns agree and where it is larger than that.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from record import ROOT
from rich.console import Console

from r_tsvm_kernels.bench import ResultFile, compare_turns, different_circumstances, read_report
from r_tsvm_kernels.bench.table import change_table


def build(sources: Path, target: Path) -> Path:
    """Install the package from its sources into a folder of its own."""
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target"]
    subprocess.run([*install, target, sources], check=True)
    return target


def bench(installed: Path, file: Path, arguments: list[str]) -> dict[str, Any]:
    """Run `rtsvm bench` of an installation; return its report."""
    command = [sys.executable, "-m", "r_tsvm_kernels", "bench", "--json", str(file), *arguments]
    # Not from here: the working tree would be imported in its place.
    done = subprocess.run(
        command, cwd=file.parent, env=os.environ | {"PYTHONPATH": str(installed)}, stdout=subprocess.DEVNULL
    )
    if not file.exists():
        raise SystemExit(
            f"{installed.name}: `rtsvm bench` ended with exit code {done.returncode}; is it in that commit?"
        )
    return read_report(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", help="commit to compare with; it must have `rtsvm bench`")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--out", help="write all reports to this new JSON file")
    args, passed = parser.parse_known_args()
    commit = subprocess.run(
        ["git", "rev-parse", "--verify", f"{args.base}^{{commit}}"], cwd=ROOT, capture_output=True, text=True
    )
    if commit.returncode != 0 or args.turns < 1:
        parser.error(f"{args.base!r} is no commit of this repository, or --turns is below 1")
    file = ResultFile(args.out) if args.out else None
    turns = []
    with tempfile.TemporaryDirectory(prefix="rtsvm-bench-") as name:
        folder = Path(name)
        tree = folder / "tree"
        subprocess.run(["git", "worktree", "add", "--detach", "-q", tree, commit.stdout.strip()], cwd=ROOT, check=True)
        try:
            before, after = build(tree, folder / "before"), build(ROOT, folder / "after")
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", tree], cwd=ROOT, check=True)
        for turn in range(args.turns):
            reports = {}
            for side in (before, after) if turn % 2 == 0 else (after, before):
                reports[side] = bench(side, folder / f"{side.name}-{turn}.json", passed)
            turns.append((reports[before], reports[after]))
            print(f"turn {turn + 1} of {args.turns}: done", file=sys.stderr, flush=True)
    console = Console(width=None if sys.stdout.isatty() else 160)
    changes, noise = compare_turns(turns)
    console.print(change_table(changes))
    for line in different_circumstances(*turns[0]):
        console.print(f"not the same for both: {line}", highlight=False)
    if file:
        file.write({"base": commit.stdout.strip(), "turns": [{"before": b, "after": a} for b, a in turns]})
    count = {kind: sum(change.verdict == kind for change in changes) for kind in ("faster", "slower")}
    console.print(
        f"ours: {count['faster']} faster and {count['slower']} slower by more than {100 * noise:.0f} %; "
        "19 of 20 rows of torch and peers, whose code is the same, changed by no more"
    )


if __name__ == "__main__":
    main()
