"""Time FusionBench's TSVM with and without our solver under it, and our `tsvm` as its algorithm.

    python benchmarks/peers/compare_fusion_bench.py [--peer-python PATH] [--rounds 3] [--width 768] [--layers 1]
                                                    [--out DIR]

A CLIP vision model of ViT-B/32's width and three fine-tunes lie on disk in float32. In turn, in a process of its own,
each side loads and merges them in FusionBench's environment: wall time and growth of resident memory of the algorithm's
`run`, without starting Python. Our package needs its native module for the Python of that environment.

A round is right when

* the updates of the checked matrices are within 1e-4 of a float64 SVD (Frobenius norm, relative) with our solver, and
  as far from FusionBench's as both errors explain,
* every other tensor is FusionBench's to 1e-4 of its update and the rounding of float32 weights,
* our method was called for every tensor on our sides, for none on FusionBench's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from compare_tsvm import DISTANCE_FLOOR, ERROR_LIMIT, truth_of
from comparing import Program, Turns, spread, verdict, wide_console, write
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from record import ROOT, provenance

PEER = Path(__file__).with_name("fusion_bench_clip.py")
SIDES = ("theirs", "accelerated", "ours")
TASKS = 3
CHECKED = ("layers.0.self_attn.k_proj.weight", "layers.0.mlp.fc1.weight")  # against float64

Tensors = dict[str, Tensor]


def peer(python: Path, *arguments: object) -> dict[str, Any]:
    """Run the peer's program; return the line of JSON it ends with."""
    command = [str(python), "-W", "ignore", str(PEER), *map(str, arguments)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr[-4000:]}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def gap(a: Tensor, b: Tensor, norm: float) -> float:
    return float((a.double() - b.double()).norm()) / norm


def largest_errors(folder: Path, merged: dict[str, Tensors]) -> dict[str, Any]:
    """Compare the sides; errors are relative to the update."""
    base, *tuned = (
        load_file(path / "model.safetensors") for path in [folder / "base", *sorted(folder.glob("tuned-*"))]
    )
    errors, distances, right = dict.fromkeys(SIDES, 0.0), dict.fromkeys(SIDES[1:], 0.0), True
    for name, start in base.items():
        theirs = merged["theirs"][name]
        norm = float((theirs - start).double().norm())
        rounding = 2**-23 * float(theirs.double().norm()) / norm  # of the weights, in float32
        own = dict.fromkeys(SIDES, 0.0)
        if name.endswith(CHECKED):
            exact = start.double() + torch.from_numpy(truth_of([t[name] - start for t in tuned]).merged)
            own = {side: gap(merged[side][name], exact, norm) for side in SIDES}
        for side in SIDES[1:]:
            distance = gap(merged[side][name], theirs, norm)
            distances[side] = max(distances[side], distance)
            allowed = 2 * own["theirs"] + own[side] + DISTANCE_FLOOR if name.endswith(CHECKED) else ERROR_LIMIT
            right = right and distance <= allowed + rounding and own[side] <= ERROR_LIMIT + rounding
        errors = {side: max(errors[side], own[side]) for side in SIDES}
    return {"right": right, "error_against_float64": errors, "distance_to_theirs": distances}


def compare(folder: Path, python: Path, rounds: int) -> dict[str, Any]:
    turns = Turns(SIDES)
    tensors, found, right = len(load_file(folder / "base" / "model.safetensors")), {}, True
    for round_ in range(rounds):
        for side in SIDES:
            run = peer(python, "merge", folder, side, folder / f"{side}.safetensors")
            turns.add(side, run["seconds"], run["peak_bytes"])
            right = right and run["calls"] == (0 if side == "theirs" else tensors)
        if round_ == 0:
            found = largest_errors(folder, {side: load_file(folder / f"{side}.safetensors") for side in SIDES})
    return found | {"right": right and found["right"], **turns.summary("theirs")}


def print_table(results: dict[str, Any], title: str, console: Console) -> None:
    table = Table("side", "seconds", "faster", "quartiles", "memory", "error", title=title)
    for side in SIDES:
        ratio = results["ratio"].get(side)
        table.add_row(
            side,
            f"{results['seconds'][side]['median']:.2f}",
            *(spread(ratio, 2) if ratio else ("", "")),
            f"{results['peak_bytes'][side] / 1e6:.0f} MB",
            f"{results['error_against_float64'][side]:.1e}",
        )
    console.print(table)
    console.print(verdict(results["right"]))


def main() -> int:
    program = Program(__doc__, "fusion-bench", rounds=3)
    parser = program.parser
    parser.add_argument("--width", type=int, default=768, help="a multiple of 64 (default 768)")
    parser.add_argument("--layers", type=int, default=1)
    args = program.arguments()

    with tempfile.TemporaryDirectory(prefix="rtsvm-clip-") as name:
        folder = Path(name)
        versions = peer(args.peer_python, "write", folder, args.width, args.layers, TASKS)
        size = (folder / "base" / "model.safetensors").stat().st_size
        results = compare(folder, args.peer_python, args.rounds)
    console = wide_console(100)
    title = f"TSVM of {TASKS} CLIP vision models, {args.layers} layers of width {args.width}, {size / 1e6:.0f} MB each"
    print_table(results, title, console)

    report = provenance("numpy", "safetensors") | {
        "peer_versions": versions,
        "tasks": TASKS,
        "width": args.width,
        "layers": args.layers,
        "checkpoint_bytes": size,
        "limits": {"error": ERROR_LIMIT, "distance": f"2 * error_theirs + error + {DISTANCE_FLOOR:g}"},
    }
    write(report | results, args.out / "fusion_bench.json", console)
    return 0 if results["right"] else 1


if __name__ == "__main__":
    sys.exit(main())
