"""Accuracy of the matrix-product route of TSV-Merge, in every number format, against a float64 SVD.

    python benchmarks/spectral_accuracy.py [--sizes 192 320 512] [--json FILE]

Formats of tensor cores are simulated by rounding: the errors are meaningful on any machine (but for the rounding
towards zero inside tensor cores), times are not, and none are told. A row is one spectrum, size and number of tasks;
its columns are the relative Frobenius errors of the merged matrix. For comparison: a float32 SVD of everything.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from r_tsvm_kernels import __version__
from r_tsvm_kernels.linalg import tsv_merge
from r_tsvm_kernels.linalg.matmul_route import MatmulMerge, matmul_tsv_merge

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from spectra import KINDS, rank_of, spectrum

# Name, format, largest error estimate at which the spectrum is not compressed.
ROUTES = [
    ("float32", "float32", float("inf")),
    ("exact, never compressed", "fp16x3", float("inf")),
    ("exact", "fp16x3", None),
    ("fast, never compressed", "fp16", float("inf")),
    ("fast", "fp16", None),
]


def float32_svd(matrices: Tensor, rank: int) -> Tensor:
    """TSV-Merge as it is usually written: float32 SVDs throughout."""
    lefts, cores, rights = zip(*(torch.linalg.svd(matrix, full_matrices=False) for matrix in matrices), strict=True)

    def polar(basis: Tensor) -> Tensor:
        P, _, Qh = torch.linalg.svd(basis, full_matrices=False)
        return P @ Qh

    U = polar(torch.cat([left[:, :rank] for left in lefts], 1))
    V = polar(torch.cat([right[:rank] for right in rights], 0))
    return (U * torch.cat([core[:rank] for core in cores])) @ V


def relative(matrix: Tensor, exact: Tensor) -> float:
    return float(torch.linalg.vector_norm(matrix.double() - exact) / torch.linalg.vector_norm(exact))


def describe(merge: MatmulMerge, exact: Tensor) -> dict[str, Any]:
    """Return the error and the largest of each measured number over the tasks."""
    names = ("error_estimate", "residual", "invariance", "rank_defect", "ratio", "outer_steps", "inner_steps")
    worst = {name: max(getattr(part, name) for part in merge.parts) for name in names}
    compressed = sum(part.compressed for part in merge.parts)
    polar = {"polar_orthogonality": merge.orthogonality, "polar_steps": merge.polar_steps}
    return {"error": relative(merge.matrix, exact), **worst, **polar, "compressed": compressed}


def measure(kind: str, shape: tuple[int, int], tasks: int) -> dict[str, Any]:
    rank = rank_of(kind, min(shape), tasks)
    matrices = torch.stack([spectrum(kind, *shape, seed) for seed in range(tasks)])
    truth = tsv_merge(matrices.double(), [rank] * tasks)
    routes = {
        name: describe(matmul_tsv_merge(matrices, [rank] * tasks, None, precision, limit), truth.matrix)
        for name, precision, limit in ROUTES
    }
    condition = max(truth.certificate.basis_condition)
    return {
        "spectrum": kind,
        "shape": shape,
        "tasks": tasks,
        "rank": rank,
        "basis_condition": condition,
        "float32_svd": relative(float32_svd(matrices, rank), truth.matrix),
        "routes": routes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[192, 320, 512])
    parser.add_argument("--tasks", type=int, nargs="+", default=[2, 3, 8])
    parser.add_argument("--spectra", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = []
    versions = {"r_tsvm_kernels": __version__, "torch": torch.__version__, "python": platform.python_version()}
    print(f"{'':34}{'condition':>10}{'float32 SVD':>13}" + "".join(f"{name:>25}" for name, *_ in ROUTES))
    for size in arguments.sizes:
        for kind in arguments.spectra:
            for tasks in arguments.tasks:
                row = measure(kind, (size + size // 4, size), tasks)
                rows.append(row)
                errors = "".join(f"{route['error']:>25.1e}" for route in row["routes"].values())
                label = f"{kind}, n {size}, T {tasks}"
                print(f"{label:34}{row['basis_condition']:>10.0f}{row['float32_svd']:>13.1e}{errors}", flush=True)
                if arguments.json:
                    arguments.json.parent.mkdir(parents=True, exist_ok=True)
                    arguments.json.write_text(
                        json.dumps({"simulated": True, "versions": versions, "rows": rows}, indent=1) + "\n"
                    )


if __name__ == "__main__":
    main()
