"""Time the merge of packed experts against the same experts one by one.

    python -m benchmarks.packed_experts [--experts 32 128] [--scale 12] [--solver eigen products] [--rounds 5]

Both sides merge with `tsvm`, in turns: `merge_tensors` of the packed tensor (E, m, n), which solver `products` merges
in batches, and of each expert. The shapes are those of gpt-oss (2880x2880) and Qwen3-MoE (768x2048), divided by
`--scale`. The results must be equal within the error that solvers are allowed. On a CPU, `products` is a simulation:
its time means nothing, and only the smallest number of experts is run.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from torch import Tensor

from benchmarks.program import Program, Turns, finish, judged
from r_tsvm_kernels import merge_tensors
from r_tsvm_kernels.bench import Results, Row, row

NAME, TASKS = "mlp.experts.down_proj", 3
SHAPES = ((2880, 2880), (768, 2048))  # gpt-oss, Qwen3-MoE


def measure(shape: tuple[int, int, int], solver: str, rounds: int, device: str) -> list[Row]:
    """Time both sides in interleaved rounds, after one that is not counted."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(shape, generator=generator)
    tuned = [(base + 0.01 * torch.randn(shape, generator=generator)).to(device) for _ in range(TASKS)]
    base = base.to(device)
    turns = Turns()

    def packed() -> Tensor:
        return merge_tensors(base, tuned, "tsvm", solver=solver, name=NAME).weight

    def apart() -> Tensor:
        own = [[model[i] for model in (base, *tuned)] for i in range(shape[0])]
        return torch.stack([merge_tensors(first, rest, "tsvm", solver=solver).weight for first, *rest in own])

    sides, results = {"packed": packed, "one by one": apart}, {}
    for number in range(rounds + 1):
        for side, run in sides.items():
            start = time.perf_counter()
            results[side] = run()
            if device == "cuda":
                torch.cuda.synchronize()
            if number:
                turns.add(side, time.perf_counter() - start)
    change = (results["one by one"] - base).double()
    error = float((results["packed"] - results["one by one"]).double().norm() / change.norm())
    case: dict[str, Any] = {"shape": shape, "dtype": "float32", "options": {"solver": solver, "tasks": TASKS}}
    difference = judged(row("packed experts", "packed", "error", error, **case), error <= 2e-4)
    return [*turns.rows("packed experts", ["one by one"], ["packed"], **case), difference]


def main() -> int:
    program = Program(__doc__, "packed_experts.json", rounds=5)
    program.parser.add_argument("--experts", type=int, nargs="+", default=[32, 128], help="numbers of experts")
    program.parser.add_argument("--scale", type=int, default=12, help="divides both sides of every expert")
    program.parser.add_argument("--solver", nargs="+", default=["eigen", "products"], help="eigen, products")
    args = program.arguments()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results = Results(args.json, (), replace=True)
    for m, n in SHAPES:
        for experts in args.experts:
            for solver in args.solver:
                if solver == "eigen" or device == "cuda" or experts == min(args.experts):
                    shape = (experts, m // args.scale, n // args.scale)
                    results.add(measure(shape, solver, args.rounds, device))
    return finish(results)


if __name__ == "__main__":
    sys.exit(main())
