"""Measure `tsvm` and FusionBench's TSV-Merge against a float64 SVD, on the same task matrices.

    python -m benchmarks.peers.compare_tsvm [--peer-python PATH] [--json FILE] [--checkpoints BASE MODEL ...]

Errors are Frobenius norms relative to the float64 result. A case is right when

* error(ours) <= 1e-4,
* distance(ours, peer) <= 2 error(peer) + error(ours) + 1e-6,
* the peer, run in float64, confirms our float64 result to 1e-8. The second condition cannot do this: it holds whenever
  ours is close to the float64 result, right or wrong.

Where a basis is rank deficient the peer completes it with arbitrary null vectors. Such cases are not judged; they
report how much of the update's energy is in rows that no expert touched.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

# One thread, for the peer's process too: on matrices this small the hand-over between threads costs more than the work.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks import ROOT
from benchmarks.program import Program, finish, judged
from r_tsvm_kernels import MergeConfig, merge_tensors
from r_tsvm_kernels.bench import Results, Row, published, row

PEER, PEER_PROGRAM = "FusionBench", "benchmarks.peers.fusion_bench_tsvm"

SEED = 0
ERROR_LIMIT = 1e-4  # ours against float64
DISTANCE_FLOOR = 1e-6
CONFIRMED_LIMIT = 1e-8  # the peer in float64 against our float64

Cases = dict[str, list[Tensor]]
Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class Truth:
    """TSV-Merge in float64."""

    merged: Matrix
    rank: int  # k, singular vectors per task
    condition: float  # of the worse of the two concatenated bases
    deficient: bool


# --- the cases -------------------------------------------------------------------------------------------------


def gaussian(rng: np.random.Generator, m: int, n: int) -> Matrix:
    return rng.standard_normal((m, n))


def signal(rng: np.random.Generator, m: int, n: int) -> Matrix:
    """Rank 16, then a flat tail of white noise."""
    strong = rng.standard_normal((m, 16)) @ rng.standard_normal((16, n))
    return strong + 0.5 * rng.standard_normal((m, n))


def power_law(rng: np.random.Generator, m: int, n: int, exponent: float) -> Matrix:
    """The i-th singular value is i ** -exponent."""
    r = min(m, n)
    u, v = (np.linalg.qr(rng.standard_normal((size, r)))[0] for size in (m, n))
    return np.asarray((u * np.arange(1, r + 1) ** -exponent) @ v.T)


FAMILIES: dict[str, Callable[[np.random.Generator, int, int], Matrix]] = {
    "gaussian": gaussian,
    "signal16": signal,
    "power0.3": partial(power_law, exponent=0.3),
    "power0.7": partial(power_law, exponent=0.7),
    "power1.2": partial(power_law, exponent=1.2),
}
SMALL = [(64, 64), (97, 130), (130, 97), (192, 96), (96, 192)]
LARGE = [(255, 255), (384, 384), (384, 129), (129, 384)]


def make_cases() -> Cases:
    """Task matrices by case name. Every case has a generator of its own, so that a new one changes no other."""

    def rng(name: str) -> np.random.Generator:
        return np.random.default_rng([SEED, zlib.crc32(name.encode())])

    grid = [*product(FAMILIES, SMALL, (1, 2, 3, 8)), *product(("gaussian", "power0.7"), LARGE, (3, 8))]
    deltas: dict[str, list[Matrix]] = {}
    for family, (m, n), tasks in grid:
        name = f"{family}-{m}x{n}-T{tasks}"
        deltas[name] = [FAMILIES[family](g, m, n) for g in rng(name).spawn(tasks)]
    deltas["bias-257-T3"] = [g.standard_normal(257) for g in rng("bias").spawn(3)]

    # Like an embedding whose rarer tokens no expert met: 3 * 85 directions in the 182 rows that moved.
    sparse = [gaussian(g, 256, 256) for g in rng("untouched").spawn(3)]
    for delta in sparse:
        delta[182:] = 0
    deltas["untouched-256x256-T3"] = sparse

    return {name: [torch.from_numpy(0.01 * d).float() for d in tasks] for name, tasks in deltas.items()}


def checkpoint_cases(base: Path, models: list[Path]) -> Cases:
    """Task vectors of real checkpoints (folders with a model.safetensors), float32, one case per tensor."""
    start, *tuned = (load_file(folder / "model.safetensors") for folder in (base, *models))
    return {f"trained-{name}": [t[name].float() - weight.float() for t in tuned] for name, weight in start.items()}


# --- the three sides -------------------------------------------------------------------------------------------


def truth_of(deltas: list[Tensor]) -> Truth:
    """TSV-Merge by SVDs in float64.

    Singular values that float32, the precision of the task matrices, cannot tell from zero are left out: those of a
    task, and those of a concatenated basis. Only rank deficient cases have any.
    """
    tasks = [delta.double() for delta in deltas]
    if tasks[0].ndim != 2:
        return Truth(torch.stack(tasks).mean(0).numpy(), 0, 1.0, False)

    k = int(min(tasks[0].shape) * (1 / len(tasks)))
    tolerance = max(tasks[0].shape) * torch.finfo(torch.float32).eps
    left, core, right = published.bases(tasks, [k] * len(tasks), zero=tolerance)
    condition, deficient = 1.0, len(core) < k * len(tasks)
    for basis in (left, right):
        values = torch.linalg.svdvals(basis)
        kept = int((values > published.RANK_TOLERANCE * values[:1]).sum())
        condition = max(condition, float(values[0] / values[kept - 1]) if kept else 1.0)
        deficient = deficient or kept < len(core)
    merged = (published.polar(left) * core) @ published.polar(right)
    return Truth(merged.numpy(), k, condition, deficient)


def ours_of(deltas: list[Tensor]) -> Matrix:
    base = torch.zeros_like(deltas[0])
    merged = merge_tensors(base, deltas, MergeConfig(merge_method="tsvm")).weight
    return (merged - base).double().numpy()


def peer_of(cases: Cases, python: Path) -> tuple[dict[str, Matrix], dict[str, Matrix], dict[str, str]]:
    """Return the peer's results from float32 and from float64, and its versions. One process for all cases."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "tasks.safetensors"), Path(folder, "merged.safetensors")
        tensors = {}
        for case, deltas in cases.items():
            for t, delta in enumerate(deltas):
                tensors[f"float32/{case}/{t}"] = delta.contiguous()
                tensors[f"float64/{case}/{t}"] = delta.double().contiguous()
        save_file(tensors, source)
        subprocess.run([python, "-m", PEER_PROGRAM, source, target], cwd=ROOT, check=True)
        merged = {name: tensor.double().numpy() for name, tensor in load_file(target).items()}
        versions = json.loads(Path(f"{target}.json").read_text())
    single, double = ({case: merged[f"{dtype}/{case}"] for case in cases} for dtype in ("float32", "float64"))
    return single, double, versions


# --- the comparison --------------------------------------------------------------------------------------------


def compare(case: str, deltas: list[Tensor], peer: Matrix, peer_float64: Matrix) -> list[Row]:
    truth = truth_of(deltas)
    ours = ours_of(deltas)
    norm = float(np.linalg.norm(truth.merged)) or 1.0

    def gap(a: Matrix, b: Matrix) -> float:
        return float(np.linalg.norm(a - b)) / norm

    error_ours, error_peer, distance = gap(ours, truth.merged), gap(peer, truth.merged), gap(ours, peer)
    error_peer_float64 = gap(peer_float64, truth.merged)
    right = truth.deficient or (
        error_ours <= ERROR_LIMIT
        and distance <= 2 * error_peer + error_ours + DISTANCE_FLOOR
        and error_peer_float64 <= CONFIRMED_LIMIT
    )
    untouched = np.all([(delta == 0).reshape(delta.shape[0], -1).all(1).numpy() for delta in deltas], axis=0)

    def untouched_energy(merged: Matrix) -> float:
        return 100 * float(np.sum(merged[untouched] ** 2) / (np.sum(merged**2) or 1.0))

    labels = {"shape": deltas[0].shape, "dtype": "float32", "options": {"matrices": case, "tasks": len(deltas)}}
    notes = {"rank": truth.rank, "condition": float(truth.condition), "rank_deficient": truth.deficient,
             "untouched_rows": int(untouched.sum()), "judged": not truth.deficient}  # fmt: skip
    rows = [
        judged(row("tsvm", "tsvm", "error", error_ours, notes=notes, **labels), right),
        row("tsvm", PEER, "error", error_peer, role="peer", **labels),
        row("tsvm", f"{PEER}, float64", "error", error_peer_float64, role="peer", **labels),
        row("tsvm", "tsvm", "distance", distance, unit="relative", notes={"against": PEER}, **labels),
    ]
    if untouched.any():
        energy = {"metric": "energy in untouched rows", "unit": "%", **labels}
        rows += [row("tsvm", "tsvm", values=untouched_energy(ours), **energy),
                 row("tsvm", PEER, values=untouched_energy(peer), role="peer", **energy)]  # fmt: skip
    return rows


def main() -> int:
    program = Program(__doc__, "tsvm_vs_fusion_bench.json", "fusion-bench")
    program.parser.add_argument(
        "--checkpoints", type=Path, nargs="+", metavar="FOLDER", help="more cases: a base, then models"
    )
    args = program.arguments()
    cases = make_cases()
    if args.checkpoints:
        cases |= checkpoint_cases(args.checkpoints[0], args.checkpoints[1:])
    peer, peer_float64, versions = peer_of(cases, args.peer_python)
    results = Results(args.json, ("numpy", "safetensors"), replace=True)
    results.circumstances["versions"] |= {"fusion-bench": versions["fusion_bench"]}
    for case, deltas in cases.items():
        results.add(compare(case, deltas, peer[case], peer_float64[case]))
    return finish(results)


if __name__ == "__main__":
    sys.exit(main())
