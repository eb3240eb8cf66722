"""Measure what torch and a GPU can do: the rates and baselines that the kernels of the package are compared with.

    python benchmarks/ceilings.py [--out DIR] [--dry-run]

Copy bandwidth; matrix products in each format; torch's own eigh, svd and qr; selection by topk, kthvalue and sort;
TSV-Merge as published, by SVDs with driver gesvd, of the matrices of one layer of Mistral-7B (`layer_merge.py` has it
with the driver that torch chooses). What takes more than five seconds is timed once. Writes `ceilings.json`, one row as
soon as it is measured. With --dry-run sizes are tiny and a CPU will do; such figures mean nothing and are marked.
"""

from __future__ import annotations

import torch
from gpu import MISTRAL_LAYER, TASKS, Suite, suite_of

from r_tsvm_kernels.bench import matrix as shape_of
from r_tsvm_kernels.bench import published


def bandwidth(suite: Suite) -> None:
    source = suite.random(16384, 16384)
    target = torch.empty_like(source)
    suite.measure("copy float32", lambda: target.copy_(source), gigabytes=2 * source.numel() * 4 / 1e9)


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
            suite.measure(f"matmul {name} {n}", lambda a=a, b=b: a @ b, teraflop=2 * n**3 / 1e12)
    torch.backends.cuda.matmul.allow_tf32 = False


def selection(suite: Suite) -> None:
    flat = suite.random(14336, 4096).abs().flatten()
    keep, gigabytes = flat.numel() // 5, flat.numel() * 4 / 1e9
    suite.measure("topk 20 %", lambda: flat.topk(keep), repeats=3, gigabytes=gigabytes)
    suite.measure("kthvalue", lambda: flat.kthvalue(flat.numel() - keep), repeats=3, gigabytes=gigabytes)
    suite.measure("sort", lambda: flat.sort(), repeats=3, gigabytes=gigabytes)


def decompositions(suite: Suite) -> None:
    for n in (1024, 2048, 4096):
        for dtype in (torch.float32, torch.float64):
            matrix = suite.random(n, n, dtype=dtype)
            gram = matrix.mT @ matrix
            kind = str(dtype).removeprefix("torch.")
            suite.measure(f"eigh {kind} {n}", lambda gram=gram: torch.linalg.eigh(gram), repeats=2)
            suite.measure(f"qr {kind} {n}", lambda matrix=matrix: torch.linalg.qr(matrix), repeats=3)
            for driver in ("gesvd", "gesvdj") if suite.device.type == "cuda" else (None,):
                suite.measure(
                    f"svd {driver} {kind} {n}",
                    lambda matrix=matrix, driver=driver: torch.linalg.svd(matrix, full_matrices=False, driver=driver),
                    repeats=1,
                )


def published_merges(suite: Suite) -> None:
    driver = "gesvd" if suite.device.type == "cuda" else None
    for name in MISTRAL_LAYER:
        matrices = [1e-3 * suite.random(*shape_of(f"Mistral-7B {name}")) for _ in range(TASKS)]
        ranks = [min(matrices[0].shape) // TASKS] * TASKS
        suite.measure(
            f"published TSV-Merge {driver} {name}",
            lambda matrices=matrices, ranks=ranks: published.tsv_merge(matrices, ranks, driver=driver),
            repeats=1,
        )


def main() -> None:
    suite = suite_of("ceilings.json", "Measure what torch can do on this GPU.")
    for part in (bandwidth, products, selection, decompositions, published_merges):
        part(suite)


if __name__ == "__main__":
    main()
