"""Measure what torch and a GPU can do: the rates and baselines that the kernels of the package are compared with.

    python -m benchmarks.ceilings [--out DIR] [--dry-run]

Copy bandwidth; matrix products in each format; torch's own eigh, svd and qr; selection by topk, kthvalue and sort;
TSV-Merge as published, by SVDs with driver gesvd, of the matrices of one layer of Mistral-7B (`layer_merge` has it with
the driver that torch chooses). Calls of more than five seconds are timed once. Writes `ceilings.json`, row by row. With
`--dry-run` sizes are tiny and a CPU will do; such figures mean nothing and are marked.
"""

from __future__ import annotations

import sys

import torch

from benchmarks.gpu import TASKS, Suite, arguments_of, suite_of
from r_tsvm_kernels.bench import matrix as shape_of
from r_tsvm_kernels.bench import published


def bandwidth(suite: Suite) -> None:
    source = suite.random(16384, 16384)
    target = torch.empty_like(source)
    suite.measure("copy", "torch", lambda: target.copy_(source), bytes=2 * source.nbytes)


def products(suite: Suite) -> None:
    for n in (1024, 4096):
        for name, dtype, tf32 in [
            ("bfloat16", torch.bfloat16, False),
            ("float16", torch.float16, False),
            ("tf32", torch.float32, True),
            ("float32", torch.float32, False),
            ("float64", torch.float64, False),
        ]:
            a, b = suite.random(n, n, dtype=dtype), suite.random(n, n, dtype=dtype)
            torch.backends.cuda.matmul.allow_tf32 = tf32
            suite.measure("matmul", "torch", lambda a=a, b=b: a @ b, flops=2 * n**3, format=name, n=n)
    torch.backends.cuda.matmul.allow_tf32 = False


def selection(suite: Suite) -> None:
    flat = suite.random(14336, 4096).abs().flatten()
    keep = flat.numel() // 5
    suite.measure("topk", "torch", lambda: flat.topk(keep), rounds=3, bytes=flat.nbytes)
    suite.measure("kthvalue", "torch", lambda: flat.kthvalue(flat.numel() - keep), rounds=3, bytes=flat.nbytes)
    suite.measure("sort", "torch", lambda: flat.sort(), rounds=3, bytes=flat.nbytes)


def decompositions(suite: Suite) -> None:
    for n in (1024, 2048, 4096):
        for dtype in (torch.float32, torch.float64):
            matrix = suite.random(n, n, dtype=dtype)
            gram = matrix.mT @ matrix
            case = {"format": str(dtype).removeprefix("torch."), "n": n}
            suite.measure("eigh", "torch", lambda gram=gram: torch.linalg.eigh(gram), rounds=2, **case)
            suite.measure("qr", "torch", lambda matrix=matrix: torch.linalg.qr(matrix), rounds=3, **case)
            for driver in ("gesvd", "gesvdj") if suite.device.type == "cuda" else (None,):
                suite.measure(
                    "svd",
                    driver or "torch",
                    lambda matrix=matrix, driver=driver: torch.linalg.svd(matrix, full_matrices=False, driver=driver),
                    rounds=1,
                    **case,
                )


def published_merges(suite: Suite) -> None:
    driver = "gesvd" if suite.device.type == "cuda" else None
    for name in ("q_proj", "k_proj", "gate_proj", "down_proj"):  # v is as k, o as q, up as gate
        matrices = [1e-3 * suite.random(*shape_of(f"Mistral-7B {name}")) for _ in range(TASKS)]
        ranks = [min(matrices[0].shape) // TASKS] * TASKS
        suite.measure(
            "tsv_merge as published",
            driver or "torch",
            lambda matrices=matrices, ranks=ranks: published.tsv_merge(matrices, ranks, driver=driver),
            rounds=1,
            matrix=f"Mistral-7B {name}",
        )


def main() -> None:
    suite, _ = suite_of("ceilings.json", arguments_of(__doc__))
    for part in (bandwidth, products, selection, decompositions, published_merges):
        part(suite)


if __name__ == "__main__":
    sys.exit(main())
