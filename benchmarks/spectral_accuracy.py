"""Error of TSV-Merge on every route, against float64 SVDs, beside float32 SVDs and the peers.

    python -m benchmarks.spectral_accuracy [--sizes 192 512] [--peer-python PATH] [--checkpoints BASE MODEL ...]
                                           [--json FILE]
    python -m benchmarks.spectral_accuracy --sizes 1024 --solvers eigen --json .../spectral_accuracy_1024.json

Task matrices are merged at k = r // T and at a quarter of it; the errors are Frobenius norms of the merged matrix,
relative to float64:

* float32 SVD: SVDs of task matrices and bases in float32, as the method is usually written.
* whitening: the published eigenvalue variant: float32 SVDs of the task matrices, bases whitened by the float32
  eigenvalues of their Gram matrix.
* FusionBench: its own function in its environment, if --peer-python is given; only at k = r // T, the rank it has.
* eigen, products: our two solvers in both modes. "never compressed" switches the second solve of heavy-tailed spectra
  off, "fp16" takes one fp16 plane instead of two: both are not offered, and show why. From 768 columns on the eigen
  solver whitens in float32; simulated products take long there, --solvers eigen leaves them out.

Formats of tensor cores are simulated by rounding, so the errors hold on any machine, except for the rounding towards
zero inside tensor cores. Nothing is timed.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks import ROOT
from benchmarks.program import Program, finish
from r_tsvm_kernels.bench import Results, Row, published, row, worst_error
from r_tsvm_kernels.linalg import Mode, Solver, TsvMerge, tsv_merge
from r_tsvm_kernels.linalg.products.merge import ProductsMerge, products_tsv_merge
from tests.spectra import KINDS, rank_of, spectrum

PEER = "benchmarks.peers.fusion_bench_tsvm"
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


ZERO = torch.finfo(torch.float32).eps  # singular values up to this share of the norm are rounding errors of float32
ROLES = {"float32 SVD": "reference", "whitening": "reference", "FusionBench": "peer"}


def whitened(basis: Tensor) -> Tensor:
    """Return the polar factor by the eigenvalues of the Gram matrix of the short side."""
    if basis.shape[0] < basis.shape[1]:
        return whitened(basis.mT).mT
    values, Q = torch.linalg.eigh(basis.mT @ basis)
    return basis @ (Q / values.clamp(min=torch.finfo(values.dtype).tiny).sqrt()) @ Q.mT


def of_solver(merge: TsvMerge) -> dict[str, Any]:
    certificate = merge.certificate
    return {"estimate": certificate.error, "route": certificate.route, "escalations": list(certificate.escalations)}


def of_format(merge: ProductsMerge) -> dict[str, Any]:
    """The largest of each measured number over the tasks."""
    names = ("error_estimate", "residual", "invariance", "rank_defect", "ratio", "outer_steps", "inner_steps")
    worst = {name: max(getattr(part, name) for part in merge.parts) for name in names}
    compressed = sum(part.compressed for part in merge.parts)
    polar = {"polar_orthogonality": merge.orthogonality, "polar_steps": merge.polar_steps}
    return {"estimate": worst.pop("error_estimate"), **worst, **polar, "compressed": compressed}


def measure(
    name: str, matrices: Tensor, label: str, rank: int, peer: Tensor | None, solvers: Sequence[str], full_rank: bool
) -> list[Row]:
    """The rows of one case. Formats on their own only where no row or column is untouched: the solvers handle that."""
    tasks = len(matrices)
    ranks = [rank] * tasks
    exact = published.tsv_merge([matrix.double() for matrix in matrices], ranks, zero=ZERO)
    in_float32 = list(matrices)
    merged: dict[str, tuple[Tensor, dict[str, Any]]] = {
        "float32 SVD": (published.tsv_merge(in_float32, ranks, zero=ZERO), {}),
        "whitening": (published.tsv_merge(in_float32, ranks, zero=ZERO, orthogonalize=whitened).nan_to_num(), {}),
    }
    if peer is not None:
        merged["FusionBench"] = peer, {}
    conditions = []
    for route, mode, solver in SOLVERS:
        if solver in solvers:
            found = tsv_merge(matrices, ranks, mode=mode, solver=solver)
            merged[route] = found.matrix, of_solver(found)
            conditions += [c for c in found.certificate.basis_condition if c == c]
    for route, precision, limit in FORMATS if "products" in solvers and full_rank else []:
        simulated = products_tsv_merge(matrices, ranks, None, precision, limit)
        merged[route] = simulated.matrix, of_format(simulated)
    case: dict[str, Any] = {"shape": matrices.shape[1:], "dtype": "float32",
                            "options": {"matrices": name, "ranks": label, "tasks": tasks}}  # fmt: skip
    rows = [
        row("tsv_merge", route, "error", worst_error([matrix], [exact]), role=ROLES.get(route, "ours"),
            notes={"rank": rank, **notes}, **case)
        for route, (matrix, notes) in merged.items()
    ]  # fmt: skip
    if conditions:
        condition = row("tsv_merge", "bases", "condition", max(conditions), unit="condition number", **case)
        rows.insert(0, condition)
    return rows


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
        subprocess.run([python, "-m", PEER, source, target], cwd=ROOT, check=True)
        return load_file(target)


def main() -> int:
    program = Program(__doc__, "spectral_accuracy.json")
    parser = program.parser
    parser.add_argument("--sizes", type=int, nargs="+", default=[192, 512])
    parser.add_argument("--tasks", type=int, nargs="+", default=[2, 3, 8])
    parser.add_argument("--spectra", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--solvers", nargs="+", choices=get_args(Solver), default=get_args(Solver))
    parser.add_argument("--peer-python", type=Path, help="Python of FusionBench's environment")
    parser.add_argument("--checkpoints", type=Path, nargs="+", default=[], metavar="FOLDER", help="a base, then models")
    arguments = program.arguments()
    found = cases(arguments.sizes, arguments.tasks, arguments.spectra)
    real = trained(arguments.checkpoints[0], arguments.checkpoints[1:]) if arguments.checkpoints else {}
    found |= real
    peers = peer_merges(found, arguments.peer_python) if arguments.peer_python else {}
    results = Results(arguments.json, ("numpy", "safetensors"), replace=True)
    for name, matrices in found.items():
        tasks, short = len(matrices), min(matrices.shape[1:])
        for label, share in SHARES.items():
            rank = max(1, rank_of(name.partition(",")[0], short, tasks) // share)
            peer = peers.get(name) if share == 1 else None
            results.add(measure(name, matrices, label, rank, peer, arguments.solvers, name not in real))
            print(f"{name}, {label}: done", file=sys.stderr, flush=True)
    return finish(results)


if __name__ == "__main__":
    sys.exit(main())
