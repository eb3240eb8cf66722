"""Time mergekit's command with and without our backend: wall time and peak memory side by side.

    python benchmarks/peers/compare_mergekit_cli.py [--peer-python PATH] [--size 1] [--rounds 3] [--folder DIR]
                                                    [--out DIR] [--methods NAME ...]

`mergekit-yaml` and `rtsvm mergekit-yaml` run in the peer's environment on the same recipe (dtype bfloat16), base and
two fine-tunes of `--size` GB each, in turn, with the inputs in the page cache. The time is that of the whole command.
Our backend must be built for the Python of that environment. `--size 1` wants 6 GB of free disk.

A deterministic case is right when every element of our result is the merge in float64 rounded to bfloat16, but for the
last place of float32 sums; elements tied at a threshold are left out, as mergekit keeps any of them. Where masks are
random, other ones on the two sides, the norms of both updates must agree within a percent.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from compare_engine import ROUNDING, SUMMING, TASKS, peer_command, peer_versions, read
from compare_ties import DENSITY, GAMMA, METHODS, tied, truth
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from memory import run_measured
from models import Family, family, warm
from record import RESULTS, ROOT, provenance, quartiles, ratios

RANDOM = {"dare_ties", "dare_linear", "della", "della_linear"}
PARAMETERS = {name: parameters for name, (parameters, _, _) in METHODS.items()} | {
    "task_arithmetic": {"weight": 1.0},
    "della": {"weight": 1.0, "density": DENSITY, "epsilon": 0.1},
    "della_linear": {"weight": 1.0, "density": DENSITY, "epsilon": 0.1},
}
CHECKED = "layers.0."  # all layers hold the same values
NORMS = 0.01


def write_recipe(models: Family, method: str) -> Path:
    recipe = {
        "merge_method": method,
        "base_model": str(models.base),
        "models": [{"model": str(model), "parameters": PARAMETERS[method]} for model in models.tuned],
        "dtype": "bfloat16",
    }
    file = models.base.parent / f"{method}.yaml"
    file.write_text(json.dumps(recipe))  # JSON is YAML
    return file


def checked_tensors(models: Family) -> list[str]:
    names = json.loads((models.base / "model.safetensors.index.json").read_text())["weight_map"]
    return [name for name in names if CHECKED in name and "norm" not in name]


def largest_error(models: Family, method: str, merged: Path) -> float:
    """Largest error of an element, as a multiple of what is allowed."""
    largest = 0.0
    for name in checked_tensors(models):
        base, tuned = read(models.base, name), [read(model, name) for model in models.tuned]
        if method == "task_arithmetic":
            update, ties = sum(weight - base for weight in tuned), None
        else:
            update, ties = truth(method, base, tuned), tied(method, base, tuned)
        expected = base + update
        allowed = ROUNDING * expected.abs() + SUMMING * (base.abs() + sum(weight.abs() for weight in tuned))
        gap = (read(merged, name) - expected).abs() / allowed.clamp_min(1e-300)
        largest = max(largest, float(gap.max() if ties is None else gap.masked_fill(ties, 0).max()))
    return largest


def update_norm(models: Family, merged: Path) -> float:
    squares = [(read(merged, name) - read(models.base, name)).square().sum() for name in checked_tensors(models)]
    return float(sum(squares)) ** 0.5


def compare(models: Family, method: str, python: Path, rounds: int) -> dict[str, Any]:
    recipe, out = write_recipe(models, method), models.base.parent / "out"
    peer = peer_command(python, recipe, out)
    commands = {"with": [str(python), "-m", "r_tsvm_kernels", "mergekit-yaml", *peer[1:]], "without": peer}
    env = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    seconds: dict[str, list[float]] = {side: [] for side in commands}
    peaks: dict[str, list[int]] = {side: [] for side in commands}
    found: dict[str, float] = {}
    for round_ in range(-1, rounds):  # round -1 compiles Python's files
        for side, command in commands.items():
            warm(models.files)
            run = run_measured(command, env)
            if round_ >= 0:
                seconds[side].append(run.seconds)
                peaks[side].append(run.peak_bytes)
            elif method in RANDOM:
                found[side] = update_norm(models, out)
            else:
                found[side] = largest_error(models, method, out)
            shutil.rmtree(out)
    agree = abs(found["with"] / found["without"] - 1) <= NORMS if method in RANDOM else found["with"] <= 1
    return {
        "right": agree,
        "update_norms" if method in RANDOM else "largest_errors": found,
        "seconds": {side: quartiles(values) for side, values in seconds.items()},
        "ratio": ratios(seconds["without"], seconds["with"]),
        "peak_bytes": {side: max(values) for side, values in peaks.items()},
    }


def print_table(rows: dict[str, dict[str, Any]], title: str, console: Console) -> None:
    table = Table("method", "verdict", "with", "without", "ratio", "quartiles", "peak with", "without", title=title)
    for method, row in rows.items():
        ratio = row["ratio"]
        table.add_row(
            method,
            "right" if row["right"] else "[bold red]WRONG",
            *(f"{row['seconds'][side]['median']:.1f} s" for side in ("with", "without")),
            f"{ratio['median']:.1f}",
            f"{ratio['q1']:.1f} - {ratio['q3']:.1f}",
            *(f"{row['peak_bytes'][side] / 1e6:.0f} MB" for side in ("with", "without")),
        )
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default_python = ROOT / ".venv-mergekit" / "bin" / "python"
    parser.add_argument("--peer-python", type=Path, default=default_python, help="Python of the peer's environment")
    parser.add_argument("--size", type=float, default=1, metavar="GB", help="per model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=2048, help="width of the models (default 2048)")
    parser.add_argument("--methods", nargs="+", choices=PARAMETERS, default=list(PARAMETERS), metavar="NAME")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where the models are written")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON")
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error("a spread needs at least two rounds")
    if not args.peer_python.exists():
        parser.error(f"no {args.peer_python}: run mergekit_env.sh first")

    with family(args.folder, args.size, TASKS, args.hidden) as models:
        results = {method: compare(models, method, args.peer_python, args.rounds) for method in args.methods}
        size = models.checkpoint_bytes
    console = Console()
    console.width = max(console.width, 120)  # a log has no width of its own
    print_table(results, f"mergekit-yaml, base and {TASKS} fine-tunes of {size / 1e9:.2f} GB, bfloat16", console)

    report = provenance("safetensors") | {
        "peer_versions": peer_versions(args.peer_python),
        "tasks": TASKS,
        "hidden": args.hidden,
        "checkpoint_bytes": size,
        "density": DENSITY,
        "gamma": GAMMA,
        "limits": {"element_rounding": ROUNDING, "element_summing": SUMMING, "norms": NORMS},
        "methods": results,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    target = args.out / "mergekit_cli.json"
    target.write_text(json.dumps(report, indent=1) + "\n")
    console.print(f"written: {target}")
    return 0 if all(row["right"] for row in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
