"""Time FusionBench's TSVM with and without our solver, and our `tsvm` as its algorithm.

    python -m benchmarks.peers.compare_fusion_bench [--peer-python PATH] [--rounds 5] [--width 768] [--layers 1]
                                                    [--json FILE]

A CLIP vision model of ViT-B/32's width and three fine-tunes are stored in float32. In interleaved rounds, each side
loads and merges them in FusionBench's environment, in a process of its own: wall time and growth of resident memory of
the algorithm's `run`, without starting Python. Our package needs its native module for the Python of that environment.

A side is right when

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
from safetensors.torch import load_file
from torch import Tensor

from benchmarks import ROOT
from benchmarks.engine import gigabytes
from benchmarks.peers.compare_tsvm import DISTANCE_FLOOR, ERROR_LIMIT, truth_of
from benchmarks.program import Program, Turns, finish, judged
from r_tsvm_kernels.bench import Results, Row, row

PEER = "benchmarks.peers.fusion_bench_clip"
# The argument of the peer's program by side.
THEIRS = "FusionBench"
SIDES = {THEIRS: "theirs", "FusionBench on our solver": "accelerated", "tsvm as its algorithm": "ours"}
OURS = list(SIDES)[1:]
TASKS = 3
CHECKED = ("layers.0.self_attn.k_proj.weight", "layers.0.mlp.fc1.weight")  # against float64

Tensors = dict[str, Tensor]


def peer(python: Path, *arguments: object) -> dict[str, Any]:
    """Run the peer's program; return the line of JSON it ends with."""
    command = [str(python), "-W", "ignore", "-m", PEER, *map(str, arguments)]
    env = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr[-4000:]}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def gap(a: Tensor, b: Tensor, norm: float) -> float:
    return float((a.double() - b.double()).norm()) / norm


def largest_errors(folder: Path, merged: dict[str, Tensors]) -> tuple[dict[str, float], dict[str, float], bool]:
    """Return the errors against float64 and the distances to FusionBench by side, and whether ours are right.

    All are relative to the update.
    """
    base, *tuned = (
        load_file(path / "model.safetensors") for path in [folder / "base", *sorted(folder.glob("tuned-*"))]
    )
    errors, distances, right = dict.fromkeys(SIDES, 0.0), dict.fromkeys(OURS, 0.0), True
    for name, start in base.items():
        theirs = merged[THEIRS][name]
        norm = float((theirs - start).double().norm())
        rounding = 2**-23 * float(theirs.double().norm()) / norm  # of the weights, in float32
        own = dict.fromkeys(SIDES, 0.0)
        if name.endswith(CHECKED):
            exact = start.double() + torch.from_numpy(truth_of([t[name] - start for t in tuned]).merged)
            own = {side: gap(merged[side][name], exact, norm) for side in SIDES}
        for side in OURS:
            distance = gap(merged[side][name], theirs, norm)
            distances[side] = max(distances[side], distance)
            allowed = 2 * own[THEIRS] + own[side] + DISTANCE_FLOOR if name.endswith(CHECKED) else ERROR_LIMIT
            right = right and distance <= allowed + rounding and own[side] <= ERROR_LIMIT + rounding
        errors = {side: max(errors[side], own[side]) for side in SIDES}
    return errors, distances, right


def compare(folder: Path, python: Path, rounds: int, case: dict[str, Any]) -> list[Row]:
    turns, right, name = Turns(), True, "TSVM of CLIP models"
    tensors = len(load_file(folder / "base" / "model.safetensors"))
    for _ in range(rounds):
        for side, argument in SIDES.items():
            run = peer(python, "merge", folder, argument, folder / f"{argument}.safetensors")
            turns.add(side, run["seconds"], run["peak_bytes"])
            right = right and run["calls"] == (0 if side == THEIRS else tensors)
    merged = {side: load_file(folder / f"{argument}.safetensors") for side, argument in SIDES.items()}
    errors, distances, close = largest_errors(folder, merged)
    rows = turns.rows(name, [THEIRS], OURS, **case)
    rows += [row(name, side, "error", value, role="ours" if side in OURS else "peer", **case)
             for side, value in errors.items()]  # fmt: skip
    return rows + [
        judged(row(name, side, "distance", value, unit="relative", notes={"against": THEIRS}, **case), right and close)
        for side, value in distances.items()
    ]


def main() -> int:
    program = Program(__doc__, "fusion_bench.json", "fusion-bench", rounds=5)
    parser = program.parser
    parser.add_argument("--width", type=int, default=768, help="a multiple of 64 (default 768)")
    parser.add_argument("--layers", type=int, default=1)
    args = program.arguments()
    results = Results(args.json, ("numpy", "safetensors"), replace=True)
    with tempfile.TemporaryDirectory(prefix="rtsvm-clip-") as name:
        folder = Path(name)
        results.circumstances["versions"] |= peer(args.peer_python, "write", folder, args.width, args.layers, TASKS)
        size = (folder / "base" / "model.safetensors").stat().st_size
        options = {"checkpoint": gigabytes(size), "tasks": TASKS, "width": args.width, "layers": args.layers}
        results.add(compare(folder, args.peer_python, args.rounds, {"dtype": "float32", "options": options}))
    return finish(results)


if __name__ == "__main__":
    sys.exit(main())
