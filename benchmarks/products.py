"""Time on a GPU what merges by products are made of: the products, eigenspaces by purification, polar factors.

    python -m benchmarks.products [--out DIR] [--dry-run]

Products of 4096 x 4096 matrices from fp16 planes, alone and three in a batch, and torch's own in float16 and float32.
Rates count the arithmetic that is needed: half a product where the result is symmetric. Errors are relative to float64
(Frobenius), of normal and of positive operands: tensor cores round sums towards zero, and on positive operands all
those errors have one sign. `rtsvm bench` has the same kernels at sizes of other models, `layer_merge` the merges. Runs
Triton's kernels, whatever the dispatch table prefers. Writes `products.json`. With `--dry-run` the references run on
the CPU with tiny sizes; such figures mean nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

from benchmarks.gpu import Suite, arguments_of, suite_of
from r_tsvm_kernels import ops
from r_tsvm_kernels.bench import row, worst_error
from r_tsvm_kernels.bench.case import all_on
from r_tsvm_kernels.linalg import use_cuda_graphs
from r_tsvm_kernels.linalg.products.polar_express import polar_express
from r_tsvm_kernels.linalg.products.purification import leading_eigenspaces

BATCH = 3
SIZE = 4096
DRAWS: dict[str, Callable[..., Tensor]] = {"normal": torch.randn, "positive": torch.rand}


def products(suite: Suite) -> None:
    n = suite.size(SIZE)
    for batch in (1, BATCH):
        flops = 2.0 * batch * n**3
        for operands, draw in DRAWS.items():
            x = draw(batch, n, n, device=suite.device)
            symmetric = (x + x.mT) / (2 * n)
            exact, exact_square = x.double(), symmetric.double()
            exact, exact_square = exact.mT @ exact, 2 * exact_square - exact_square @ exact_square
            for low, label in ((True, "fp16x3"), (False, "fp16x1")):
                planes, square = ops.split_planes(x, low=low), ops.split_planes(symmetric, low=low)
                for name, run, truth, done in (
                    ("symm_gram", lambda p=planes: ops.symm_gram(p), exact, flops / 2),
                    ("symm_square", lambda p=square: ops.symm_square(p, -1.0, 2.0), exact_square, flops / 2),
                    ("gemm3", lambda p=planes: ops.gemm3(p.mT, p), exact, flops),
                ):
                    case = {"format": label, "batch": batch, "n": n, "operands": operands}
                    suite.measure(name, "triton", run, flops=done, role="ours", **case)
                    error = relative_error(run, truth)
                    suite.add([row(name, "triton", "error", error, options=case)])
            del exact, exact_square
        for dtype in (torch.float16, torch.float32):
            a = suite.random(batch, SIZE, SIZE, dtype=dtype)
            case = {"format": str(dtype).removeprefix("torch."), "batch": batch, "n": n}
            suite.measure("matmul", "torch", lambda a=a: a.mT @ a, flops=flops, **case)


def relative_error(run: Callable[[], object], exact: Tensor) -> float | None:
    """Return the distance of a product from float64; None if it fails, which the row of its time reports."""
    try:
        found = run()
    except Exception:  # whatever compilers and libraries raise
        return None
    matrix = getattr(found, "matrix", found)
    return worst_error([matrix.dense() if isinstance(matrix, ops.Planes) else matrix], [exact])


def algorithms(suite: Suite) -> None:
    for full in (1024, SIZE):
        n = suite.size(full)
        x = suite.random(BATCH, full, full)
        gram = x.mT @ x / n
        gram = (gram + gram.mT) / 2
        basis = torch.cat([torch.linalg.qr(z[:, : n // BATCH]).Q for z in x], 1)
        for graphs, label in ((nullcontext(), False), (use_cuda_graphs(), True)):
            case = {"n": n, "cuda_graphs": label}
            with graphs:
                suite.measure(
                    "leading_eigenspaces",
                    "triton",
                    lambda gram=gram, n=n: leading_eigenspaces(gram, [n // 3] * BATCH),
                    role="ours",
                    **case,
                )
                suite.measure(
                    "polar_express",
                    "triton",
                    lambda basis=basis: polar_express(basis, BATCH**0.5, 1e-5),
                    role="ours",
                    **case,
                )


def main() -> None:
    suite, _ = suite_of("products.json", arguments_of(__doc__))
    with all_on("triton", suite.device.type):
        products(suite)
        algorithms(suite)


if __name__ == "__main__":
    sys.exit(main())
