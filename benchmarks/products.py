"""Time the products on fp16 planes on a GPU, beside torch's own, and check them.

    python benchmarks/products.py [--out DIR] [--dry-run]

Rates are in useful flops: ``2 m n k`` for a product, half of that for a symmetric one, whatever the number of fp16
products behind it. Writes `ceilings.json` into DIR. With --dry-run the references run on the CPU with tiny sizes; such
figures mean nothing.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from ceilings import Suite

from r_tsvm_kernels.dispatch import explain
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
        suite.measure(
            f"leading_eigenspaces {BATCH}x{n}", lambda gram=gram, n=n: leading_eigenspaces(gram, [n // 3] * BATCH)
        )
        basis = torch.cat([torch.linalg.qr(z[:, : n // BATCH]).Q for z in x], 1)
        suite.measure(f"polar_express {n}", lambda basis=basis: polar_express(basis, BATCH**0.5, 1e-5))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/local/products"))
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, on the CPU")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    suite = Suite(options.out, options.dry_run)
    if suite.device.type != "cuda" and not options.dry_run:
        parser.error("torch sees no CUDA device; --dry-run shows that the program works")
    for backend, state in explain("symm_square", suite.device.type):
        if state == "ready":
            products(suite, backend)
    algorithms(suite)


if __name__ == "__main__":
    main()
