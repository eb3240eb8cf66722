"""Error of the usual shortcuts in TSV-Merge, against float64 SVDs: why none of them is a solver here.

    python -m benchmarks.shortcuts [--n 512] [--json FILE]

Three tasks at k = r // T, as published, and at a quarter of it, which adaptive ranks often choose. A shortcut in
finding the subspaces leaves the rest in float64; the others are whole computations in float32. Formats are simulated by
rounding, so the errors hold on any machine. Nothing is timed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.program import Program, finish
from benchmarks.spectral_accuracy import ZERO, whitened
from r_tsvm_kernels.bench import Results, published, row, worst_error
from r_tsvm_kernels.linalg import tsv_merge
from tests.spectra import spectrum

TASKS = 3
SPECTRA = ("flat", "power 0.7")


def rounded(matrix: Tensor, bits: int) -> Tensor:
    """Round to so many bits of significand: 8 are bfloat16's, 11 fp16's and tf32's."""
    mantissa, exponent = torch.frexp(matrix)
    return torch.ldexp((mantissa * 2**bits).round() / 2**bits, exponent)


def merged(matrices: Tensor, rank: int, subspaces: Callable[[Tensor, int], tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """TSV-Merge in float64 with the leading subspaces found in another way."""
    parts = [subspaces(matrix, rank) for matrix in matrices]
    left, core, right = (torch.cat([part[i].double() for part in parts], -1) for i in range(3))
    return (published.polar(left) * core) @ published.polar(right).mT


def randomised(iterations: int) -> Callable[[Tensor, int], tuple[Tensor, Tensor, Tensor]]:
    def subspaces(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        torch.manual_seed(0)
        U, s, V = torch.svd_lowrank(matrix, q=min(rank + 10, *matrix.shape), niter=iterations)
        return U[:, :rank], s[:rank], V[:, :rank]

    return subspaces


def by_gram(bits: int) -> Callable[[Tensor, int], tuple[Tensor, Tensor, Tensor]]:
    """Eigenvectors of a Gram matrix whose factors are rounded, as in a product on tensor cores."""

    def subspaces(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        factor = rounded(matrix, bits)
        _, V = torch.linalg.eigh(factor.mT @ factor)
        U, s, Wh = torch.linalg.svd(matrix @ V[:, -rank:], full_matrices=False)
        return U, s, V[:, -rank:] @ Wh.mT

    return subspaces


def shortcuts(matrices: Tensor, rank: int) -> dict[str, Tensor]:
    """The merged matrix by each shortcut; `matrices` are (T, m, n) float32."""
    exact, in_float32, ranks = matrices.double(), list(matrices), [rank] * TASKS
    return {
        "randomised SVD, 2 power iterations": merged(exact, rank, randomised(2)),
        "randomised SVD, 8 power iterations": merged(exact, rank, randomised(8)),
        "Gram matrix of bfloat16 factors": merged(exact, rank, by_gram(8)),
        "Gram matrix of tf32 or fp16 factors": merged(exact, rank, by_gram(11)),
        "bases whitened by float32 eigenvalues": published.tsv_merge(
            in_float32, ranks, zero=ZERO, orthogonalize=whitened
        ).nan_to_num(),
        "float32 SVDs throughout": published.tsv_merge(in_float32, ranks, zero=ZERO),
        "ours, exact, solver eigen": tsv_merge(matrices, ranks).matrix,
        "ours, exact, solver products (simulated)": tsv_merge(matrices, ranks, solver="products").matrix,
    }


def main() -> int:
    program = Program(__doc__, "shortcuts.json")
    program.parser.add_argument("--n", type=int, default=512, help="columns; rows are a quarter more (%(default)s)")
    arguments = program.arguments()
    results, n = Results(arguments.json, replace=True), arguments.n
    for kind in SPECTRA:
        matrices = torch.stack([spectrum(kind, n + n // 4, n, seed) for seed in range(TASKS)])
        for label, rank in (("k = r // T", n // TASKS), ("k = r // 4T", n // TASKS // 4)):
            exact = published.tsv_merge(list(matrices.double()), [rank] * TASKS, zero=ZERO)
            results.add(
                row("tsv_merge", name, "error", worst_error([found], [exact]), shape=matrices.shape[1:],
                    dtype="float32", role="ours" if name.startswith("ours") else "reference",
                    options={"spectrum": kind, "ranks": label, "tasks": TASKS})
                for name, found in shortcuts(matrices, rank).items()
            )  # fmt: skip
    return finish(results)


if __name__ == "__main__":
    sys.exit(main())
