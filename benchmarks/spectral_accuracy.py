"""Error of TSV-Merge on every route, against float64 SVDs, beside float32 SVDs and the peers.

    python benchmarks/spectral_accuracy.py [--sizes 192 512] [--peer-python PATH] [--checkpoints BASE MODEL ...]
                                           [--json FILE]
    python benchmarks/spectral_accuracy.py --sizes 1024 --solvers eigen [...]

A row is one set of task matrices at k = r // T or a quarter of it; its columns are relative Frobenius errors of the
merged matrix:

* float32 SVD: SVDs of task matrices and bases in float32, as the method is usually written.
* whitening: the published eigenvalue variant: float32 SVDs of the task matrices, bases whitened by the float32
  eigenvalues of their Gram matrix.
* FusionBench: its own function in its environment, if --peer-python is given; only at k = r // T, the rank it has.
* eigen, products: our two solvers in both modes. "never compressed" switches the second solve of heavy-tailed spectra
  off, "fp16" takes one fp16 plane instead of two: both are not offered, and show why. From 768 columns on the eigen
  solver whitens in float32; simulated products take long there, --solvers eigen leaves them out.

Formats of tensor cores are simulated by rounding: errors are meaningful on any machine (but for the rounding towards
zero inside tensor cores), times are not, and none are told.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from record import ROOT, provenance
from safetensors.torch import load_file, save_file
from torch import Tensor

from r_tsvm_kernels.linalg import Mode, Solver, TsvMerge, tsv_merge
from r_tsvm_kernels.linalg.products.merge import ProductsMerge, products_tsv_merge

sys.path.insert(0, str(ROOT / "tests"))
from spectra import KINDS, rank_of, spectrum

PEER = ROOT / "benchmarks" / "peers" / "fusion_bench_tsvm.py"
SHARES = {"k = r // T": 1, "k = r // 4T": 4}
# Name, format, largest error estimate at which the spectrum is not compressed.
FORMATS = [
    ("products float32", "float32", float("inf")),
    ("products, never compressed", "fp16x3", float("inf")),
    ("products fp16", "fp16", None),
]
SOLVERS: list[tuple[str, Mode, Solver]] = [
    ("eigen exact", "exact", "eigen"),
    ("eigen fast", "fast", "eigen"),
    ("products exact", "exact", "products"),
    ("products fast", "fast", "products"),
]


Decomposed = list[tuple[Tensor, Tensor, Tensor]]


def svds(matrices: Tensor) -> Decomposed:
    return [torch.linalg.svd(matrix, full_matrices=False) for matrix in matrices]


def merge_by_svd(tasks: Decomposed, rank: int, polar: Callable[[Tensor], Tensor]) -> Tensor:
    """TSV-Merge as published, in the dtype of the tasks; ranks clipped to the numerical rank of float32."""
    left, core, right = [], [], []
    for U, s, Vh in tasks:
        k = min(rank, int((s > torch.finfo(torch.float32).eps * s.norm()).sum()))
        left.append(U[:, :k])
        core.append(s[:k])
        right.append(Vh[:k])
    return (polar(torch.cat(left, 1)) * torch.cat(core)) @ polar(torch.cat(right, 0).mT).mT


def polar_by_svd(basis: Tensor) -> Tensor:
    P, s, Qh = torch.linalg.svd(basis, full_matrices=False)
    kept = int((s > 1e-6 * s[0]).sum())
    return P[:, :kept] @ Qh[:kept]


def whitened(basis: Tensor) -> Tensor:
    values, Q = torch.linalg.eigh(basis.mT @ basis)
    return basis @ (Q / values.clamp(min=torch.finfo(values.dtype).tiny).sqrt()) @ Q.mT


def relative(matrix: Tensor, exact: Tensor) -> float:
    return float(torch.linalg.vector_norm(matrix.double() - exact) / torch.linalg.vector_norm(exact))


def of_solver(merge: TsvMerge, exact: Tensor) -> dict[str, Any]:
    certificate = merge.certificate
    told = {"estimate": certificate.error, "route": certificate.route, "escalations": list(certificate.escalations)}
    return {"error": relative(merge.matrix, exact), **told}


def of_format(merge: ProductsMerge, exact: Tensor) -> dict[str, Any]:
    """The error, and the largest of each measured number over the tasks."""
    names = ("error_estimate", "residual", "invariance", "rank_defect", "ratio", "outer_steps", "inner_steps")
    worst = {name: max(getattr(part, name) for part in merge.parts) for name in names}
    compressed = sum(part.compressed for part in merge.parts)
    polar = {"polar_orthogonality": merge.orthogonality, "polar_steps": merge.polar_steps}
    return {"error": relative(merge.matrix, exact), "estimate": worst.pop("error_estimate"), **worst, **polar,
            "compressed": compressed}  # fmt: skip


def measure(
    matrices: Tensor, decomposed: tuple[Decomposed, Decomposed], rank: int, peer: Tensor | None,
    solvers: Sequence[str], full_rank: bool,
) -> dict[str, Any]:  # fmt: skip
    """One row, from the matrices and their SVDs in float64 and float32.

    Formats on their own only where no row or column is untouched, which the solvers take care of.
    """
    tasks = len(matrices)
    in_float64, in_float32 = decomposed
    exact = merge_by_svd(in_float64, rank, polar_by_svd)
    routes: dict[str, Any] = {
        "float32 SVD": {"error": relative(merge_by_svd(in_float32, rank, polar_by_svd), exact)},
        "whitening": {"error": relative(merge_by_svd(in_float32, rank, whitened).nan_to_num(), exact)},
    }
    if peer is not None:
        routes["FusionBench"] = {"error": relative(peer, exact)}
    conditions = []
    for name, mode, solver in SOLVERS:
        if solver not in solvers:
            continue
        merge = tsv_merge(matrices, [rank] * tasks, mode=mode, solver=solver)
        routes[name] = of_solver(merge, exact)
        conditions += [c for c in merge.certificate.basis_condition if c == c]
    for name, precision, limit in FORMATS if "products" in solvers and full_rank else []:
        routes[name] = of_format(products_tsv_merge(matrices, [rank] * tasks, None, precision, limit), exact)
    condition = max(conditions, default=None)
    return {"tasks": tasks, "shape": list(matrices.shape[1:]), "rank": rank, "basis_condition": condition,
            "routes": routes}  # fmt: skip


def cases(sizes: list[int], tasks: list[int], kinds: list[str]) -> dict[str, Tensor]:
    """Synthetic task matrices by name."""
    return {
        f"{kind}, n {n}, T {count}": torch.stack([spectrum(kind, n + n // 4, n, seed) for seed in range(count)])
        for n in sizes for kind in kinds for count in tasks
    }  # fmt: skip


def trained(base: Path, models: list[Path]) -> dict[str, Tensor]:
    """Task matrices of really trained models."""
    start, *tuned = (load_file(folder / "model.safetensors") for folder in (base, *models))
    return {
        f"trained {name}": torch.stack([t[name].float() - weight.float() for t in tuned])
        for name, weight in start.items() if weight.ndim == 2
    }  # fmt: skip


def peer_merges(found: dict[str, Tensor], python: Path) -> dict[str, Tensor]:
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "in.safetensors"), Path(folder, "out.safetensors")
        save_file({f"{name}/{t}": m.contiguous() for name, ms in found.items() for t, m in enumerate(ms)}, source)
        subprocess.run([python, PEER, source, target], check=True)
        return load_file(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[192, 512])
    parser.add_argument("--tasks", type=int, nargs="+", default=[2, 3, 8])
    parser.add_argument("--spectra", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--solvers", nargs="+", choices=get_args(Solver), default=get_args(Solver))
    parser.add_argument("--peer-python", type=Path, help="Python of FusionBench's environment")
    parser.add_argument("--checkpoints", type=Path, nargs="+", default=[], metavar="FOLDER", help="a base, then models")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found = cases(arguments.sizes, arguments.tasks, arguments.spectra)
    real = trained(arguments.checkpoints[0], arguments.checkpoints[1:]) if arguments.checkpoints else {}
    found |= real
    peers = peer_merges(found, arguments.peer_python) if arguments.peer_python else {}
    report = provenance("numpy", "safetensors") | {"simulated": True, "rows": []}
    for name, matrices in found.items():
        tasks, short = len(matrices), min(matrices.shape[1:])
        decomposed = svds(matrices.double()), svds(matrices)
        for label, share in SHARES.items():
            kind = name.partition(",")[0]
            rank = max(1, rank_of(kind, short, tasks) // share)
            peer = peers.get(name) if share == 1 else None
            measured = measure(matrices, decomposed, rank, peer, arguments.solvers, name not in real)
            row = {"case": name, "ranks": label, **measured}
            report["rows"].append(row)
            errors = "  ".join(f"{route} {values['error']:.1e}" for route, values in row["routes"].items())
            print(f"{name}, {label}: condition {row['basis_condition'] or math.nan:.0f}; {errors}", flush=True)
            if arguments.json:
                arguments.json.parent.mkdir(parents=True, exist_ok=True)
                arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
