"""Work that solver ``products`` gives a GPU: operations, launches and waits, counted without one.

    python -m benchmarks.gpu_work [--json FILE]

A merge runs on the CPU with matrices of a short side of 256, on the path that a GPU takes: every loop runs to its
limit, because nobody waits for the device to ask whether all is done. Sizes are filled up as at full size. Operations
are multiplied by the cube of the scale (its square where a factor is a few vectors wide). Counted per matrix:

* fp16: operations on tensor cores; a product of two pairs of planes takes three, a symmetric one half of them. Squares
  of a matrix that is done cost nothing, as in the kernels;
* float64: operations of products, triangular solves and factorisations;
* launches: torch's operations, and the Triton kernels, with all that their wrappers launch;
* replayed: the same where loops are CUDA graphs, see `use_cuda_graphs`: one launch, and a copy of each argument and
  result;
* waits of the host for the device.

What a fallback to another solver takes, if an estimated error is too large, is not counted.
"""

from __future__ import annotations

import math
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction

from benchmarks.program import Program, finish
from r_tsvm_kernels import dispatch
from r_tsvm_kernels.bench import Results, Row, row
from r_tsvm_kernels.linalg import long_side_is_whole, orthonormal
from r_tsvm_kernels.linalg.products import gram_polar, merge, number_formats, polar_express, purification, subspaces
from r_tsvm_kernels.linalg.products.cuda_graph import PRODUCTS, tensors_in
from r_tsvm_kernels.linalg.products.merge import products_tsv_merges
from r_tsvm_kernels.linalg.products.weighted import products_weighted_merges
from r_tsvm_kernels.ops import _triton_products
from tests.spectra import spectrum

SHORT, TASKS = 256, 3
SHAPES = ((4096, 4096), (1024, 4096), (14336, 4096))
# What `rtsvm merge` puts into one batch on a GPU: k and v of four layers, see `BATCH_ELEMENTS`.
BATCH, BATCH_SHAPE = 8, (1024, 4096)
THIN = (1, 4, 8, 16, 20, 24, 32, 40, 48, 72)  # columns of random vectors and directions, as many at any size

# Operations that launch nothing.
FREE = [
    "view",
    "_unsafe_view",
    "t",
    "transpose",
    "permute",
    "expand",
    "slice",
    "select",
    "unbind",
    "unsqueeze",
    "squeeze",
    "as_strided",
    "alias",
    "detach",
    "split",
    "split_with_sizes",
    "reshape",
    "_reshape_alias",
    "diagonal",
    "lift_fresh",
    "empty",
    "empty_like",
    "new_empty",
    "empty_strided",
    "new_empty_strided",
    "_local_scalar_dense",
]


class Work(TorchDispatchMode):
    """Counts what runs inside its ``with`` block."""

    def __init__(self, scale: int = 1) -> None:
        super().__init__()
        self.scale = scale
        self.operations: dict[str, float] = defaultdict(float)
        self.launches: Counter[str] = Counter()
        self.replayed: Counter[str] = Counter()
        self._recorded = 0
        self.waits = 0
        self._inside = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count it."""
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1].rstrip("_")
        if self._inside:
            return result
        self.waits += name == "_local_scalar_dense"
        if name not in FREE:
            self._launch(name)
            self._count(name, args, kwargs or {}, result)
        return result

    def _count(self, name: str, args: tuple[Any, ...], options: dict[str, Any], result: Any) -> None:
        operations = 0.0
        if name in ("mm", "bmm", "addmm", "baddbmm"):
            a, b = args[:2] if name in ("mm", "bmm") else args[1:3]
            operations = 2 * math.prod(a.shape) * b.shape[-1] * self._scaled(min(a.shape[-2], b.shape[-1]))
        elif "cholesky" in name:
            a = args[0]
            operations = math.prod(a.shape) * a.shape[-1] / 3 * self._scaled(a.shape[-1])
        elif "solve_triangular" in name or name == "triangular_solve":
            a, b = args[:2]
            other = b.shape[-1] if options.get("left", True) else b.shape[-2]
            operations = math.prod(a.shape) * other * self._scaled(other)
        elif "eigh" in name or "svd" in name:
            a = args[0]
            operations = 9 * math.prod(a.shape) * a.shape[-1] * self._scaled(a.shape[-1])
        if operations:
            self.operations[str(a.dtype).removeprefix("torch.")] += operations

    def _scaled(self, columns: int) -> float:
        """Return the factor to full size of a product whose smallest side is that wide."""
        return float(self.scale ** (2 if columns in THIN else 3))

    def _launch(self, name: str) -> None:
        self.launches[name] += 1
        if not self._recorded:
            self.replayed[name] += 1

    def _launched(self, *args: Any, **options: Any) -> None:
        self._launch("kernel")

    def graph(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run what would be a graph."""
        self._recorded += 1
        try:
            result = function(*args)
        finally:
            self._recorded -= 1
        self.replayed["graph"] += 1
        self.replayed["copy"] += sum(1 for _ in tensors_in((args, result)))
        return result

    def product(self, name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap an op of planes."""

        def counted(*args: Any, **options: Any) -> Any:
            with patch.object(JITFunction, "run", self._launched):
                getattr(dispatch.ops()[name], dispatch.MODULE["triton"]).run(*args, **options)  # of no effect
            self._inside += 1
            try:
                result = run(*args, **options)
            finally:
                self._inside -= 1
            planes = args[0]
            if name == "gemm3":
                self.operations["fp16"] += 3 * 2 * math.prod(planes.shape) * args[1].shape[-1] * self.scale**3
            elif name != "split_planes":
                columns = planes.shape[-1]
                running = 1.0
                if name == "purify_step":
                    self._inside += 1  # this is not part of the merge
                    running = float((args[1].done == 0).double().mean())
                    self._inside -= 1
                self.operations["fp16"] += 3 * math.prod(planes.shape) * columns * running * self.scale**3
            return result

        return counted


@contextmanager
def counted(scale: int) -> Iterator[Work]:
    """Count the work inside a ``with`` block, on the path of a GPU, of matrices that are `scale` times as large."""
    work, select, tolist = Work(scale), dispatch.select, Tensor.tolist

    def listed(tensor: Tensor) -> Any:
        work.waits += 1
        return tolist(tensor)

    def chosen(name: str, *tensors: Tensor, backend: str | None = None) -> Callable[..., Any]:
        run = select(name, *tensors, backend=backend)
        return work.product(name, run) if name in PRODUCTS else run

    with ExitStack() as stack:
        stack.enter_context(patch.object(dispatch, "select", chosen))
        stack.enter_context(patch.object(purification, "_all", lambda done: False))
        stack.enter_context(patch.object(subspaces, "FORESEEN_FROM", subspaces.FORESEEN_FROM // scale))
        stack.enter_context(patch.object(orthonormal, "BLOCKED_FROM", orthonormal.BLOCKED_FROM // scale))
        step = max(number_formats.ALIGNED // scale, 1)
        stack.enter_context(patch.object(number_formats, "ALIGNED", step))
        stack.enter_context(patch.object(_triton_products, "ALIGNMENT", step))
        tile = replace(_triton_products.INTERPRETED, BK=step)
        stack.enter_context(patch.object(_triton_products, "INTERPRETED", tile))
        for module in (gram_polar, merge, polar_express, purification, subspaces):
            if hasattr(module, "replayed"):
                stack.enter_context(patch.object(module, "replayed", work.graph))
        stack.enter_context(patch.object(Tensor, "tolist", listed))
        stack.enter_context(work)
        yield work


def work_of(name: str, shape: tuple[int, int], kind: str, layers: int = 1) -> tuple[Work, float]:
    """Count the merge of a batch of layers of a shape, at a smaller size; return its largest estimated error, too."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("Triton's interpreter launches more than a GPU: unset TRITON_INTERPRET")
    scale = min(shape) // SHORT
    m, n = (size // scale for size in shape)
    matrices = torch.stack([1e-3 * spectrum(kind, m, n, seed) for seed in range(layers * TASKS)])
    matrices = matrices.unflatten(0, (layers, TASKS))
    with counted(scale) as work:
        error = max(MERGES[name](matrices if m >= n else matrices.mT))
    return work, error


def tsv_merge(matrices: Tensor) -> list[float]:
    """Merge tall matrices of some layers at ranks r // T; return the estimated errors."""
    ranks = [[matrices.shape[-1] // TASKS] * TASKS] * len(matrices)
    return [merged.error for merged in products_tsv_merges(matrices, ranks)]


def weighted_merge(matrices: Tensor) -> list[float]:
    """Merge tall matrices of some layers with q = 1; return the estimated errors."""
    shape = (matrices.shape[-2], matrices.shape[-1])
    lead = None if long_side_is_whole(shape, TASKS) else -(-shape[1] // TASKS)
    merges = products_weighted_merges(matrices, [[1.0] * TASKS] * len(matrices), lead)
    return [merged.accuracy.error for merged in merges]


MERGES = {"tsv_merge": tsv_merge, "weighted_merge": weighted_merge}


def rows(name: str, shape: tuple[int, int], kind: str) -> list[Row]:
    """Return the rows of one merge."""
    work, _ = work_of(name, shape, kind)
    case: dict[str, Any] = {"shape": shape, "dtype": "float32", "options": {"spectrum": kind, "tasks": TASKS}}
    counts = {
        "fp16": (work.operations["fp16"], "operations"),
        "float64": (work.operations["float64"], "operations"),
        "launches": (sum(work.launches.values()), "launches"),
        "replayed": (sum(work.replayed.values()), "launches"),
        "waits": (work.waits, "waits"),
    }
    return [row(name, "products", metric, value, unit=unit, **case)
            for metric, (value, unit) in counts.items()]  # fmt: skip


def rows_of_batch(name: str) -> Iterator[Row]:
    """Yield the launches and waits of a batch of k and v projections."""
    work, _ = work_of(name, BATCH_SHAPE, "flat", BATCH)
    options = {"spectrum": "flat", "tasks": TASKS}
    counts = {"launches": sum(work.launches.values()), "replayed": sum(work.replayed.values()), "waits": work.waits}
    for metric, value in counts.items():
        unit = "waits" if metric == "waits" else "launches"
        label = f"{name}, batch of {BATCH}"
        yield row(label, "products", metric, value, unit=unit, shape=BATCH_SHAPE, dtype="float32", options=options)


def main() -> int:
    program = Program(__doc__, "gpu_work.json")
    args = program.arguments()
    results = Results(args.json, replace=True)
    for name in MERGES:
        for shape in SHAPES:
            for kind in ("flat", "power 0.5"):
                results.add(rows(name, shape, kind))
        results.add(rows_of_batch(name))
    return finish(results)


if __name__ == "__main__":
    sys.exit(main())
