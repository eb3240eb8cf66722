"""What the leading directions of rectangles cost and gain in weighted orthogonalisation.

    python -m benchmarks.leading_share [--suites digits ..] [--rounds 5] [--json FILE]

`weighted_merge` orthogonalises the ``k = ceil(r / T)`` leading directions of each task on both sides of a rectangle
(r its short side, T tasks), and the others on the short side alone. Here k is a share of that, or all directions:

* time of `weighted_merge` against our TSV-Merge, in turns, on matrices with singular values i^-0.5;
* gain: mean validation accuracy of `preset: weighted` above `tsvm`, both at alpha 1, on the choice suites and choice
  seeds of the quality study. Needs scikit-learn.
"""

from __future__ import annotations

import math
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import AbstractContextManager
from importlib import import_module
from unittest.mock import patch

import torch

from benchmarks.program import Program, Turns, finish
from benchmarks.quality.study import CHOICE_SEEDS, CHOICE_SUITES, Judge, mean
from benchmarks.quality.training import train_family
from r_tsvm_kernels import MergeConfig, merge_state_dicts
from r_tsvm_kernels.bench import Results, Row, row
from r_tsvm_kernels.linalg import fixed_rank, long_side_is_whole, tsv_merge, weighted_merge
from tests.spectra import spectrum

SHARES = (0.125, 0.25, 0.5, 1.0, 2.0, math.inf)
SHAPE, TASKS = (1024, 2816), 3


def leading(share: float) -> AbstractContextManager[object]:
    """Set the number of leading directions to a share of ``ceil(r / T)``; infinity takes the whole side."""

    def lead(shape: tuple[int, int], tasks: int) -> int | None:
        if math.isinf(share) or long_side_is_whole(shape, tasks):
            return None
        return min(min(shape), max(1, math.ceil(share * math.ceil(min(shape) / tasks))))

    return patch.object(import_module("r_tsvm_kernels.linalg.weighted_merging"), "_lead", lead)


def named(share: float) -> str:
    return "all" if math.isinf(share) else f"{share:g}"


def times(shape: tuple[int, int], rounds: int) -> Iterator[list[Row]]:
    """Time every share and TSV-Merge, in interleaved rounds."""
    matrices = [1e-2 * spectrum("power 0.5", *shape, seed) for seed in range(TASKS)]
    weights, rank, turns = [1.0 + 0.1 * t for t in range(TASKS)], fixed_rank(shape, TASKS), Turns()
    for _ in range(rounds):
        start = time.perf_counter()
        tsv_merge(matrices, rank, weights)
        turns.add("tsv_merge", time.perf_counter() - start)
        for share in SHARES:
            with leading(share):
                start = time.perf_counter()
                weighted_merge(matrices, weights)
                turns.add(f"share {named(share)}", time.perf_counter() - start)
    yield turns.rows(
        "leading share", ["tsv_merge"], [f"share {named(share)}" for share in SHARES],
        shape=shape, dtype="float32", options={"tasks": TASKS},
    )  # fmt: skip


def gains(suite_name: str, seeds: tuple[int, ...]) -> list[Row]:
    """Train the families of a suite, and compare the merges with `tsvm`."""
    found: dict[float, list[float]] = {share: [] for share in SHARES}
    for seed in seeds:
        torch.manual_seed(seed)
        suite = import_module(f"benchmarks.quality.suite_{suite_name}").build(seed, False)
        base, experts = train_family(suite)
        judge = Judge(suite, suite.model())
        plain = mean(judge.validation(merge_state_dicts(base, experts, MergeConfig("tsvm")).state_dict))
        for share in SHARES:
            with leading(share):
                merged = merge_state_dicts(base, experts, MergeConfig("rtsvm", preset="weighted"))
            found[share].append(mean(judge.validation(merged.state_dict)) - plain)
    return [
        row("leading share", f"share {named(share)}", "gain", mean(values), unit="points", dtype="float32",
            options={"suite": suite_name}, notes={"seeds": list(seeds), "gains": values})
        for share, values in found.items()
    ]  # fmt: skip


def measure(args: Namespace) -> Iterator[list[Row]]:
    for suite in args.suites:
        yield gains(suite, CHOICE_SEEDS)
    if args.rounds:
        yield from times(SHAPE, args.rounds)


def main() -> int:
    program = Program(__doc__, "leading_share.json", rounds=5)
    program.parser.add_argument("--suites", nargs="*", choices=CHOICE_SUITES, default=CHOICE_SUITES)
    args = program.arguments()
    results = Results(args.json, ("scikit-learn",), replace=True)
    for rows in measure(args):
        results.add(rows)
    return finish(results)


if __name__ == "__main__":
    sys.exit(main())
