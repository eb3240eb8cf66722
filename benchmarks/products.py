"""Time on a GPU what merges by products are made of: eigenspaces by purification, and polar factors.

    python benchmarks/products.py [--out DIR] [--dry-run]

The products themselves are timed by `rtsvm bench`, the merges by `layer_merge.py`. On Triton's kernels, whatever the
dispatch table prefers. Writes `products.json` into DIR. With --dry-run the references run on
the CPU with tiny sizes; such figures mean nothing.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from gpu import Suite, suite_of

from r_tsvm_kernels.bench.case import all_on
from r_tsvm_kernels.linalg import use_cuda_graphs
from r_tsvm_kernels.linalg.polar_express import polar_express
from r_tsvm_kernels.linalg.purification import leading_eigenspaces

BATCH = 3


def algorithms(suite: Suite) -> None:
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


def main() -> None:
    suite = suite_of("products.json", "Time what merges by products are made of.")
    with all_on("triton", suite.device.type):
        algorithms(suite)


if __name__ == "__main__":
    main()
