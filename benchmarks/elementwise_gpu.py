"""Time the element-wise ops on a GPU, every backend, in GB/s of the bytes that must move.

    python benchmarks/elementwise_gpu.py [--out DIR] [--dry-run]

bfloat16, three tasks, density 0.3; beside the references (eager torch) and, for stage one, torch.compile. Each result
is compared with the reference's before it is timed, and a wrong one is written down as wrong. Writes
`elementwise_gpu.json`; the copy in `ceilings.json` of the same run is the ceiling. With --dry-run the CPU backends run
with tiny sizes; such figures mean nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from ceilings import TASKS, Suite, suite_of
from torch import Tensor

from r_tsvm_kernels.dispatch import explain, use_backend
from r_tsvm_kernels.errors import RTsvmError
from r_tsvm_kernels.ops import (
    Keep,
    elect_and_sum,
    kept_count,
    magnitude_ranks,
    magnitude_select,
    random_mask,
    reweight_prune,
    reweight_prune_planes,
    task_statistics,
)

DENSITY = 0.3


def leaves(result: Any) -> list[Tensor]:
    """The tensors in a result, whatever its type."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, list | tuple):
        return [leaf for part in result for leaf in leaves(part)]
    return [leaf for part in vars(result).values() for leaf in leaves(part)] if hasattr(result, "__dict__") else []


def same(a: Any, b: Any) -> bool:
    """Equal bits, or, for sums, equal to rounding."""
    return all(
        torch.equal(x, y) or torch.allclose(x.double(), y.double(), rtol=1e-12)
        for x, y in zip(leaves(a), leaves(b), strict=True)
    )


def time_all(suite: Suite, op: str, run: Callable[[], Any], gigabytes: float) -> None:
    """Time every backend of `op` that can run."""
    with use_backend(**{op: "torch"}):
        expected = run()
    for backend, state in explain(op, suite.device.type):
        if state != "ready":
            continue
        with use_backend(**{op: backend}):
            try:
                right = same(run(), expected)
            except (RuntimeError, RTsvmError):
                right = False
            label = "" if right else " WRONG"
            suite.measure(f"{op} {backend}{label}", run, repeats=3 if backend == "torch" else 10, gigabytes=gigabytes)


def stage_one(suite: Suite, rows: int, columns: int) -> None:
    base = 0.02 * suite.random(rows, columns)
    tuned = [(base + 1e-3 * suite.random(rows, columns)).bfloat16() for _ in range(TASKS)]
    base = base.bfloat16()
    count, read = base.numel(), 2 * base.numel() * (1 + TASKS) / 1e9
    statistics = task_statistics(base, tuned)
    keep = kept_count(DENSITY, count)
    selections = [magnitude_select(weight, keep, base=base) for weight in tuned]
    rules = [Keep(largest=selection) for selection in selections]
    drawn = [Keep(probability=DENSITY, rescale=1 / DENSITY, stream=t) for t in range(TASKS)]
    written = 4 * count / 1e9
    for op, run, gigabytes in [
        ("task_statistics", lambda: task_statistics(base, tuned), read),
        ("magnitude_select", lambda: magnitude_select(tuned[0], keep), 2 * count / 1e9),
        ("reweight_prune", lambda: reweight_prune(base, tuned, statistics, "clip", DENSITY), read + TASKS * written),
        (
            "reweight_prune_planes",
            lambda: reweight_prune_planes(base, tuned, statistics, "clip", DENSITY),
            read + TASKS * written,
        ),
        ("magnitude_ranks", lambda: magnitude_ranks(tuned[0]), 6 * count / 1e9),
        ("random_mask", lambda: random_mask(base.shape, DENSITY, 1, device=suite.device), count / 1e9),
        ("elect_and_sum", lambda: elect_and_sum(base, tuned, [1.0] * TASKS), read + written),
    ]:
        time_all(suite, op, run, gigabytes)
    for name, how in (("TIES", rules), ("DARE", drawn)):
        for backend, state in explain("elect_and_sum", suite.device.type):
            if state == "ready":
                suite.measure(
                    f"elect_and_sum {name} {backend}",
                    lambda how=how, backend=backend: elect_and_sum(
                        base, tuned, [1.0] * TASKS, elect="sum", normalize=True, keep=how, backend=backend
                    ),
                    repeats=3,
                    gigabytes=read + written,
                )

    def eager(base: Tensor, *tuned: Tensor) -> list[Tensor]:
        """Stage one without exact ties: what torch.compile could fuse."""
        pruned = []
        for weight in tuned:
            delta = weight.float() - base.float()
            magnitude = delta.abs()
            theta = magnitude.mean() + 3 * magnitude.std(correction=0)
            delta = torch.clamp(delta, -theta, theta)
            threshold = delta.abs().flatten().kthvalue(count - keep + 1).values
            pruned.append(torch.where(delta.abs() >= threshold, delta, 0.0))
        return pruned

    suite.measure(
        "stage one, torch with kthvalue", lambda: eager(base, *tuned), repeats=2, gigabytes=read + TASKS * written
    )
    if suite.device.type == "cuda":
        compiled = torch.compile(eager)
        suite.measure(
            "stage one, torch.compile", lambda: compiled(base, *tuned), repeats=2, gigabytes=read + TASKS * written
        )


def main() -> None:
    suite = suite_of("elementwise_gpu.json", "Time the element-wise ops on this GPU.")
    for rows, columns in ((4096, 4096), (14336, 4096)):
        stage_one(suite, rows, columns)


if __name__ == "__main__":
    main()
