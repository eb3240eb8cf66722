"""Time `rtsvm`, by default and with the preset `weighted`, and judge weighted orthogonalisation: `weighted_merge`.

    python -m benchmarks.weighted [--largest 2048] [--rounds 5] [--peer-python PATH] [--json FILE]

* time: the whole method (`merge_tensors`) by default and with the preset, `weighted_merge` alone, our TSV-Merge and
  FusionBench's function, in turns, on the same matrices: squares, and one rectangle of the shape of an MLP. Singular
  values are i^-0.5. Weights differ, as they do with damping, so that `weighted_merge` computes the plain sum as well.
* accuracy: against float64 SVDs, for powers and condition numbers of the task matrices; nothing is timed. Solver
  ``products``, which takes power 1, is simulated, and may fall back to ``eigen``.
"""

from __future__ import annotations

import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.program import Program, Turns, finish
from benchmarks.spectral import PEER, FusionBench
from r_tsvm_kernels import merge_tensors
from r_tsvm_kernels.bench import Results, Row, row
from r_tsvm_kernels.linalg import fixed_rank, long_side_is_whole, tsv_merge, weighted_merge
from tests import oracle
from tests.spectra import spectrum

# Shape, number of tasks, and the most rounds.
TIMED = [
    ((1024, 1024), 3, 5), ((1024, 1024), 8, 5), ((2048, 2048), 3, 5), ((2048, 2048), 8, 3), ((2048, 5632), 3, 3)
]  # fmt: skip
POWERS, CONDITIONS, SHAPES = (0.0, 0.5, 0.75, 1.0), (1e1, 1e2, 1e3, 1e4), ((192, 192), (480, 192))


def timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def times(peer: FusionBench | None, shape: tuple[int, int], tasks: int, rounds: int) -> list[Row]:
    """Time all sides in interleaved rounds."""
    matrices = [1e-2 * spectrum("power 0.5", *shape, seed) for seed in range(tasks)]
    base = spectrum("flat", *shape, 99) / max(shape) ** 0.5
    tuned, weights = [base + matrix for matrix in matrices], [1.0 + 0.1 * t for t in range(tasks)]
    rank, turns = fixed_rank(shape, tasks), Turns()
    sides: dict[str, Callable[[], object]] = {
        "rtsvm": lambda: merge_tensors(base, tuned, "rtsvm"),
        "rtsvm, weighted": lambda: merge_tensors(base, tuned, "rtsvm", preset="weighted"),
        "weighted_merge": lambda: weighted_merge(matrices, weights),
        "tsv_merge": lambda: tsv_merge(matrices, rank, weights),
    }
    if peer:
        peer.load(matrices)
    for _ in range(rounds):
        if peer:
            turns.add(PEER, peer.seconds())
        for name, run in sides.items():
            turns.add(name, timed(run))
    case: dict[str, Any] = {"shape": shape, "dtype": "float32", "options": {"spectrum": "power 0.5", "tasks": tasks}}
    rivals = ["tsv_merge", *([PEER] if peer else [])]
    return turns.rows("weighted_merge", rivals, ["rtsvm", "rtsvm, weighted", "weighted_merge"], **case)


def with_condition(condition: float, shape: tuple[int, int], seed: int) -> Tensor:
    """Return a float32 matrix whose singular values fall from 1 to ``1 / condition``, evenly in their logarithms."""
    generator, n = torch.Generator().manual_seed(seed), min(shape)
    U, V = (torch.linalg.qr(torch.randn(size, n, generator=generator, dtype=torch.float64)).Q for size in shape)
    values = torch.logspace(0, -np.log10(condition), n, dtype=torch.float64)
    return torch.mm(U * values, V.mT).float()


def accuracy(shape: tuple[int, int], condition: float, power: float, tasks: int = 3) -> list[Row]:
    """Compare with float64 SVDs."""
    matrices = [with_condition(condition, shape, seed) for seed in range(tasks)]
    lead = None if long_side_is_whole(shape, tasks) else -(-min(shape) // tasks)
    exact = oracle.weighted_merge(  # type: ignore[no-untyped-call]
        [matrix.double().numpy() for matrix in matrices], [1.0] * tasks, power, None, lead
    )
    case: dict[str, Any] = {
        "shape": shape,
        "dtype": "float32",
        "options": {"condition": condition, "power": power, "tasks": tasks},
    }
    rows = []
    for solver in ("eigen", "products") if power == 1 else ("eigen",):
        got = weighted_merge(matrices, power=power, solver=solver)
        error = float(np.linalg.norm(got.matrix.double().numpy() - exact) / np.linalg.norm(exact))
        notes = {"estimate": got.certificate.error, "route": got.certificate.route}
        rows.append(row("weighted_merge", f"{solver} exact", "error", error, notes=notes, **case))
    return rows


def measure(peer: FusionBench | None, args: Namespace) -> Iterator[list[Row]]:
    for shape in SHAPES:
        for condition in CONDITIONS:
            for power in POWERS:
                yield accuracy(shape, condition, power)
    for shape, tasks, most in TIMED:
        size = (min(shape[0], args.largest), min(shape[1], args.largest * shape[1] // shape[0]))
        yield times(peer, size, tasks, min(args.rounds, most))


def main() -> int:
    program = Program(__doc__, "weighted.json", rounds=5)
    program.parser.add_argument("--largest", type=int, default=2048, help="most rows (%(default)s)")
    program.parser.add_argument("--peer-python", type=Path, help="Python of FusionBench's environment")
    args = program.arguments()
    results = Results(args.json, ("numpy", "safetensors"), replace=True)
    with tempfile.TemporaryDirectory() as folder:
        peer = FusionBench(args.peer_python, Path(folder)) if args.peer_python else None
        if peer:
            results.circumstances["versions"] |= {"fusion-bench": peer.server.versions["fusion_bench"]}
        for rows in measure(peer, args):
            results.add(rows)
        if peer:
            peer.server.close()
    return finish(results)


if __name__ == "__main__":
    sys.exit(main())
