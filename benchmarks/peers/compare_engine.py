"""Merge whole checkpoints with mergekit's command and with ours: wall time and peak memory side by side.

    python benchmarks/peers/compare_engine.py [--peer-python PATH] [--size 1] [--rounds 3] [--folder DIR] [--out DIR]

Both read the same recipe (dtype bfloat16) and the same base and two fine-tunes of `--size` GB each, in
turn, with the inputs in the page cache. The time is that of the whole command, the memory the peak of all its
processes together. `--size 1` wants 6 GB of free disk and takes a few minutes.

A case is right when every element of our result is the merge in float64 rounded to bfloat16, but for the last place
of float32 sums. `error` is that of the update, relative to its Frobenius norm, of either side.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from comparing import Program, Turns, spread, verdict, wide_console, write
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from memory import run_measured
from models import Family, family, merge_command, warm
from record import provenance

TASKS = 2
METHODS = ("linear", "task_arithmetic")
# All layers hold the same values.
CHECKED = ("embed_tokens", "model.norm", "layers.0.")
# Half a unit in the last place of bfloat16, relative to the value; the last places of a few sums in float32.
ROUNDING, SUMMING = 2**-8, 2**-22


def peer_command(python: Path, recipe: Path, out: Path) -> list[str]:
    script = python.with_name("mergekit-yaml")
    return [str(script), str(recipe), str(out), "--no-cuda", "--no-copy-tokenizer", "--quiet"]


def read(model: Path, name: str) -> Tensor:
    index = model / "model.safetensors.index.json"
    file = json.loads(index.read_text())["weight_map"][name] if index.exists() else "model.safetensors"
    with safe_open(model / file, "pt") as stream:
        tensor: Tensor = stream.get_tensor(name)
        return tensor.double()


def errors(models: Family, method: str, merged: Path) -> dict[str, float]:
    """Largest error of an element, as a multiple of what is allowed, and of an update, by its Frobenius norm."""
    largest_element = largest_update = 0.0
    names = json.loads((models.base / "model.safetensors.index.json").read_text())["weight_map"]
    for name in (name for name in names if any(part in name for part in CHECKED)):
        base, tuned = read(models.base, name), [read(model, name) for model in models.tuned]
        if method == "linear":
            expected = (base + sum(tuned)) / (1 + TASKS)
        else:
            expected = base + sum(0.5 * (weight - base) for weight in tuned)
        allowed = ROUNDING * expected.abs() + SUMMING * (base.abs() + sum(weight.abs() for weight in tuned))
        gap = read(merged, name) - expected
        largest_element = max(largest_element, float((gap.abs() / allowed.clamp_min(1e-300)).max()))
        largest_update = max(largest_update, float(gap.norm() / (expected - base).norm()))
    return {"element": largest_element, "update": largest_update}


def compare(models: Family, method: str, python: Path, rounds: int, threads: int | None) -> dict[str, Any]:
    out = models.base.parent / "out"
    recipe = models.write_recipe(method)
    commands = {"ours": merge_command(recipe, out, threads), "peer": peer_command(python, recipe, out)}
    env = os.environ | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)})
    turns = Turns(list(commands))
    found: dict[str, dict[str, float]] = {}
    for round_ in range(-1, rounds):  # round -1 compiles Python's files
        for side, command in commands.items():
            os.sync()
            warm(models.files)
            run = run_measured(command, env)
            if round_ == -1:
                found[side] = errors(models, method, out)
            else:
                turns.add(side, run.seconds, run.peak_bytes)
            shutil.rmtree(out)
    return {"right": found["ours"]["element"] <= 1, "errors": found, **turns.summary("peer", "ours")}


def peer_versions(python: Path) -> dict[str, str]:
    program = (
        "import json, platform; from importlib.metadata import version; "
        "print(json.dumps({n: version(n) for n in ('mergekit', 'torch', 'safetensors')} "
        "| {'python': platform.python_version()}))"
    )
    done = subprocess.run([str(python), "-c", program], check=True, capture_output=True, text=True)
    versions: dict[str, str] = json.loads(done.stdout)
    return versions


def print_table(rows: dict[str, dict[str, Any]], title: str, console: Console) -> None:
    columns = ("method", "verdict", "ours", "mergekit", "ratio", "quartiles", "peak", "mergekit", "error", "mergekit")
    table = Table(*columns, title=title)
    for method, row in rows.items():
        table.add_row(
            method,
            verdict(row["right"]),
            *(f"{row['seconds'][side]['median']:.1f} s" for side in ("ours", "peer")),
            *spread(row["ratio"]),
            *(f"{row['peak_bytes'][side] / 1e6:.0f} MB" for side in ("ours", "peer")),
            *(f"{row['errors'][side]['update']:.0e}" for side in ("ours", "peer")),
        )
    console.print(table)


def main() -> int:
    program = Program(__doc__, "mergekit", rounds=3)
    parser = program.parser
    parser.add_argument("--size", type=float, default=1, metavar="GB", help="per model")
    parser.add_argument("--threads", type=int, help="CPU threads of both sides (default: theirs)")
    parser.add_argument(
        "--hidden", type=int, default=2048, help="width of the models (default 2048, for 0.5 GB and up)"
    )
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where the models are written")
    args = program.arguments()

    with family(args.folder, args.size, TASKS, args.hidden) as models:
        results = {method: compare(models, method, args.peer_python, args.rounds, args.threads) for method in METHODS}
        size = models.checkpoint_bytes
    console = wide_console(120)
    print_table(results, f"base and {TASKS} fine-tunes of {size / 1e9:.2f} GB each, bfloat16", console)

    report = provenance("safetensors") | {
        "peer_versions": peer_versions(args.peer_python),
        "tasks": TASKS,
        "hidden": args.hidden,
        "checkpoint_bytes": size,
        "threads_asked": args.threads,
        "limits": {"element_rounding": ROUNDING, "element_summing": SUMMING},
        "methods": results,
    }
    write(report, args.out / "engine_vs_mergekit.json", console)
    return 0 if all(row["right"] for row in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
