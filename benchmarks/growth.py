"""See how the time of TSV-Merge grows on a GPU with the size of the matrix and with the number of tasks.

    python benchmarks/growth.py [--out DIR] [--dry-run]

k = r // T, both solvers, square matrices; T = 3 for the sizes, n = 1024 for the tasks. Writes `growth.json`, row by
row, and at the end the exponents of fitted power laws. How time grows with the size of a model: `model_merge.py`. With
--dry-run tiny matrices on the CPU; such figures mean nothing.
"""

from __future__ import annotations

import json

from gpu import TASKS, Suite, suite_of

from r_tsvm_kernels.bench.case import on_backend
from r_tsvm_kernels.bench.record import exponent
from r_tsvm_kernels.linalg import Solver, tsv_merge

SIZES, COUNTS, SIZE_OF_COUNTS = (512, 1024, 2048, 4096, 8192), (2, 3, 4, 8, 16), 1024
SOLVERS: dict[Solver, str] = {"eigen": "cuda", "products": "triton"}


def grow(suite: Suite, axis: str, cases: list[tuple[int, int]]) -> None:
    """Time cases of (n, T) and fit a power of what varies."""
    for solver, backend in SOLVERS.items():
        found = []
        for n, tasks in cases:
            matrices = [1e-3 * suite.random(n, n) for _ in range(tasks)]
            ranks = [len(matrices[0]) // tasks] * tasks

            def merge(matrices: list = matrices, ranks: list = ranks, solver: Solver = solver) -> object:
                return tsv_merge(matrices, ranks, solver=solver)

            run = on_backend(backend, merge, suite.device)
            median = suite.measure(f"tsv_merge {solver}", run, repeats=3, axis=axis, n=len(matrices[0]), tasks=tasks)
            if median is not None:
                found.append((n if axis == "n" else tasks, median))
        if len(found) > 1:
            x, y = zip(*found, strict=True)
            suite.result.setdefault("exponents", {})[f"{solver}, {axis}"] = exponent(x, y)
            suite.save()


def main() -> None:
    suite = suite_of("growth.json", "See how the time of TSV-Merge grows.")
    sizes, counts, size = ((16, 32), (2, 3), 16) if suite.dry else (SIZES, COUNTS, SIZE_OF_COUNTS)
    grow(suite, "n", [(n, TASKS) for n in sizes])
    grow(suite, "T", [(size, count) for count in counts])
    print(json.dumps(suite.result["exponents"], indent=1))


if __name__ == "__main__":
    main()
