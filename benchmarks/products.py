"""Time the products on fp16 planes on a GPU, beside torch's own, and the merge of a layer that is made of them.

    python benchmarks/products.py [--out DIR] [--dry-run]

Rates are in useful flops: ``2 m n k`` for a product, half of that for a symmetric one, whatever the number of fp16
products behind it. Writes `products.json` into DIR. With --dry-run the references run on the CPU with tiny sizes; such
figures mean nothing.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from ceilings import MISTRAL_LAYER, TASKS, Suite, suite_of

from r_tsvm_kernels.dispatch import explain, use_backend
from r_tsvm_kernels.linalg import Solver, TsvMerge, tsv_merge, use_cuda_graphs
from r_tsvm_kernels.linalg.polar_express import polar_express
from r_tsvm_kernels.linalg.purification import leading_eigenspaces
from r_tsvm_kernels.ops import gemm3, split_planes, symm_gram, symm_square

BATCH = 3


def products(suite: Suite, backend: str) -> None:
    for full in (1024, 4096):
        n = suite.size(full)
        x, y = suite.random(BATCH, full, full), suite.random(BATCH, full, full)
        teraflop = BATCH * 2 * n**3 / 1e12
        suite.measure(f"matmul float32 {BATCH}x{n}", lambda x=x, y=y: x @ y, teraflop=teraflop)
        x = (x + x.mT) / (2 * n)
        for low, name in ((True, "fp16x3"), (False, "fp16")):
            X, Y = (split_planes(z, low=low, backend=backend) for z in (x, y))
            label = f"{name} {BATCH}x{n} {backend}"
            out = symm_square(X, 2.0, -1.0, backend=backend)
            suite.measure(
                f"symm_square {label}",
                lambda X=X, out=out: symm_square(X, 2.0, -1.0, out=out, backend=backend),
                teraflop=teraflop / 2,
            )
            suite.measure(f"symm_gram {label}", lambda Y=Y: symm_gram(Y, backend=backend), teraflop=teraflop / 2)
            suite.measure(f"gemm3 {label}", lambda X=X, Y=Y: gemm3(X, Y, backend=backend), teraflop=teraflop)
            suite.measure(
                f"gemm3 transposed {label}", lambda X=X, Y=Y: gemm3(X, Y.mT, backend=backend), teraflop=teraflop
            )


def algorithms(suite: Suite) -> None:
    """Top-k eigenspaces and polar factors, on the backends that dispatch chooses."""
    for full in (1024, 4096):
        n = suite.size(full)
        x = suite.random(BATCH, full, full)
        gram = x.mT @ x / n
        gram = (gram + gram.mT) / 2
        basis = torch.cat([torch.linalg.qr(z[:, : n // BATCH]).Q for z in x], 1)
        for graphs, label in ((nullcontext(), ""), (use_cuda_graphs(), " as CUDA graphs")):
            with graphs:
                suite.measure(
                    f"leading_eigenspaces {BATCH}x{n}{label}",
                    lambda gram=gram, n=n: leading_eigenspaces(gram, [n // 3] * BATCH),
                )
                suite.measure(f"polar_express {n}{label}", lambda basis=basis: polar_express(basis, BATCH**0.5, 1e-5))


def layer(suite: Suite) -> None:
    """TSV-Merge of the matrices of one Mistral-7B layer, k = r // T, by both solvers, and their distance."""
    on_gpu = dict.fromkeys(("split_planes", "symm_gram", "symm_square", "gemm3"), "triton")
    for rows, columns in sorted(set(MISTRAL_LAYER)):
        matrices = [1e-3 * suite.random(rows, columns) for _ in range(TASKS)]
        ranks = [min(matrices[0].shape) // TASKS] * TASKS
        with use_backend(**(on_gpu if suite.device.type == "cuda" else {})):
            for solver in ("products", "eigen"):

                def merge(solver: Solver = solver, matrices: list[torch.Tensor] = matrices, ranks=ranks) -> TsvMerge:
                    return tsv_merge(matrices, ranks, solver=solver)

                certificate = merge().certificate
                label = f"tsv_merge {solver} {rows}x{columns} T{TASKS} {certificate.route} {certificate.error:.0e}"
                suite.measure(label, merge, repeats=2)


def main() -> None:
    suite = suite_of("products.json", "Time the products on fp16 planes, and what is made of them.")
    for backend, state in explain("symm_square", suite.device.type):
        if state == "ready":
            products(suite, backend)
    algorithms(suite)
    layer(suite)


if __name__ == "__main__":
    main()
