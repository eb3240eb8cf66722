"""Time and memory of `rtsvm merge` with element-wise methods, against `cp` of the same bytes and mergekit's command.

    python -m benchmarks.engine [--sizes 0.5 1 4] [--methods linear task_arithmetic] [--rounds 5] [--cold]
                                [--mergekit] [--folder DIR] [--json FILE]

For each size a base and two fine-tunes in bfloat16 are written to DIR and deleted afterwards; 8 GB need 48 GB of disk.
A merge reads all three and writes one model, so `cp` of two of them reads and writes as many bytes. A merge is on disk
when it ends; `cp and fsync` is, too, while `cp` leaves its bytes in the page cache. All sides run in interleaved rounds
with the inputs in the page cache, with `--cold` in further rounds from disk alone. Before each run, what the previous
one wrote is deleted and the disk is idle (`sync`). `--mergekit` adds mergekit's command from `--peer-python`.

The time is that of the whole command; `rtsvm merge, started` is what its report states, without starting Python and
torch. Memory is the peak of all processes together, mapped pages of files included. `worst element` is the largest
error of an element of the merge of 0.5 or so per fine-tune, as a multiple of what rounding to bfloat16 and float32 sums
allow. Exit code 1 if ours is above 1, or if its peak memory grows with the model.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from benchmarks.program import Program, Run, Turns, finish, judged, run_measured, versions_of
from benchmarks.synthetic_checkpoints import Family, evict, family, merge_command, warm
from r_tsvm_kernels.bench import Results, Row, row

TASKS = 2  # so that two models are half of what is read and written
OURS, STARTED, MERGEKIT = "rtsvm merge", "rtsvm merge, started", "mergekit-yaml"
COPIES = {"cp": False, "cp and fsync": True}
CHECKED = ("embed_tokens", "model.norm", "layers.0.")  # all layers hold the same values
# Half a unit in the last place of bfloat16, relative to the value; the last places of a few float32 sums.
ROUNDING, SUMMING = 2**-8, 2**-22
FLATNESS_LIMIT = 1.2  # largest / smallest peak over all sizes


def gigabytes(count: float) -> str:
    """Return the size of a checkpoint in words."""
    return f"{count / 1e9:.1f} GB" if count >= 5e8 else f"{count / 1e6:.0f} MB"


def read(model: Path, name: str) -> Tensor:
    """Return a tensor of a checkpoint in float64."""
    index = model / "model.safetensors.index.json"
    file = json.loads(index.read_text())["weight_map"][name] if index.exists() else "model.safetensors"
    with safe_open(model / file, "pt") as stream:
        tensor: Tensor = stream.get_tensor(name)
        return tensor.double()


def tensor_names(models: Family, *parts: str) -> list[str]:
    """Return the names of the base's tensors that contain one of the parts."""
    names = json.loads((models.base / "model.safetensors.index.json").read_text())["weight_map"]
    return [name for name in names if any(part in name for part in parts)]


def allowed_error(merged: Tensor, base: Tensor, tuned: list[Tensor]) -> Tensor:
    """Return the error of each element that rounding to bfloat16 and float32 sums explain."""
    sizes = base.abs() + sum(weight.abs() for weight in tuned)
    return (ROUNDING * merged.abs() + SUMMING * sizes).clamp_min(1e-300)


def worst_element(models: Family, method: str, merged: Path) -> float:
    """Return the largest error of an element, as a multiple of what is allowed."""
    worst = 0.0
    for name in tensor_names(models, *CHECKED):
        base, tuned = read(models.base, name), [read(model, name) for model in models.tuned]
        if method == "linear":
            expected = (base + sum(tuned)) / (1 + TASKS)
        else:
            expected = base + sum(0.5 * (weight - base) for weight in tuned)
        error = (read(merged, name) - expected).abs() / allowed_error(expected, base, tuned)
        worst = max(worst, float(error.max()))
    return worst


def mergekit_command(python: Path, recipe: Path, out: Path) -> list[str]:
    """Return mergekit's own command for a recipe."""
    script = python.with_name("mergekit-yaml")
    return [str(script), str(recipe), str(out), "--no-cuda", "--no-copy-tokenizer", "--quiet"]


def copy(models: list[Path], out: Path, durable: bool) -> float:
    """Copy models with `cp`, and write them back if asked; return the seconds."""
    out.mkdir()
    start = time.perf_counter()
    subprocess.run(["cp", "-r", *map(str, models), str(out)], check=True)
    if durable:
        subprocess.run(["sync", *map(str, out.glob("*/*"))], check=True)
    return time.perf_counter() - start


def compare(models: Family, method: str, cold: bool, args: Namespace) -> list[Row]:
    """Run all sides of one method in turn."""
    out = models.base.parent / "out"
    recipe = models.write_recipe(method)
    commands = {OURS: merge_command(recipe, out, args.threads)}
    if args.mergekit:
        commands[MERGEKIT] = mergekit_command(args.peer_python, recipe, out)
    turns, worst = Turns(), {}

    def make_ready() -> None:
        shutil.rmtree(out, ignore_errors=True)
        os.sync()
        (evict if cold else warm)(models.files)

    for round_ in range(-1, args.rounds):  # round -1 compiles Python's files
        sides: dict[str, Run] = {}
        for side, command in commands.items():
            make_ready()
            sides[side] = run_measured(command)
            if side == OURS:
                sides[STARTED] = Run(json.loads((out / "merge_report.json").read_text())["seconds"], 0)
            if round_ == -1:
                worst[side] = worst_element(models, method, out)
        for side, durable in COPIES.items():
            make_ready()
            sides[side] = Run(copy([models.base, models.tuned[0]], out, durable), 0)
        if round_ >= 0:
            for side, run in sides.items():
                turns.add(side, run.seconds, run.peak_bytes or None)
        print(f"{method}, {gigabytes(models.checkpoint_bytes)}, round {round_}: done", file=sys.stderr)
    shutil.rmtree(out)
    options = {
        "checkpoint": gigabytes(models.checkpoint_bytes), "inputs": "from disk" if cold else "cached", "tasks": TASKS
    }  # fmt: skip
    rows = turns.rows(method, [*COPIES, *([MERGEKIT] if args.mergekit else [])], [OURS, STARTED], dtype="bfloat16",
                      options=options)  # fmt: skip
    for side, value in worst.items():
        found = row(method, side, "worst element", value, unit="of the allowed rounding", dtype="bfloat16",
                    role="ours" if side == OURS else "peer", options=options)  # fmt: skip
        rows.append(judged(found, side != OURS or value <= 1))
    return rows


def main() -> int:
    program = Program(__doc__, "engine.json", "mergekit", rounds=5, optional=True)
    parser = program.parser
    parser.add_argument("--sizes", nargs="+", type=float, default=[0.5, 1, 4], metavar="GB", help="per model")
    parser.add_argument("--methods", nargs="+", default=["linear", "task_arithmetic"], metavar="METHOD")
    parser.add_argument("--hidden", type=int, default=2048, help="width of the models (%(default)s, from 0.5 GB on)")
    parser.add_argument("--threads", type=int, help="as for rtsvm merge")
    parser.add_argument("--cold", action="store_true", help="measure from disk, too")
    parser.add_argument("--mergekit", action="store_true", help="measure mergekit's command, too")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where the models are written")
    args = program.arguments()
    results = Results(args.json, ("safetensors",), replace=True)
    if args.mergekit:
        results.circumstances["versions"] |= versions_of(args.peer_python, "mergekit")
    for size in args.sizes:
        with family(args.folder, size, TASKS, args.hidden) as models:
            for method in args.methods:
                for cold in (False, True) if args.cold else (False,):
                    results.add(compare(models, method, cold, args))
    code = finish(results)
    peaks = [found["median"] for found in results.rows if (found["provider"], found["metric"]) == (OURS, "memory")]
    if max(peaks) > FLATNESS_LIMIT * min(peaks):
        print(f"peak memory grows with the model: {min(peaks) / 1e6:.0f} to {max(peaks) / 1e6:.0f} MB")
        return 1
    return code


if __name__ == "__main__":
    sys.exit(main())
