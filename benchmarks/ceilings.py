"""Measure what a GPU can do at most: the rates and baselines that every kernel of the package is compared with.

    python benchmarks/ceilings.py [--out DIR] [--dry-run]

Copy bandwidth; matrix products in each format; torch's own eigh, svd and qr; selection by topk, kthvalue and sort;
the task statistics in eager torch and by our kernels; and TSV-Merge as published (T + 2 full float32 SVDs per
matrix) on the matrices of one Mistral-7B layer. Writes `ceilings.json`, one row as soon as it is measured. With
--dry-run sizes are tiny and a CPU will do; such figures mean nothing and are marked.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from r_tsvm_kernels import __version__
from r_tsvm_kernels.dispatch import explain
from r_tsvm_kernels.ops import task_statistics

# q, k, v, o, gate, up, down of one layer of Mistral-7B, as (rows, columns).
MISTRAL_LAYER = [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336)]
TASKS = 3


class Suite:
    """Measures, prints and keeps rows; the file is complete after every row."""

    def __init__(self, file: Path, dry: bool) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() and not dry else "cpu")
        self.file = file
        file.parent.mkdir(parents=True, exist_ok=True)
        self.dry = dry
        name = torch.cuda.get_device_name() if self.device.type == "cuda" else platform.processor()
        self.result: dict[str, Any] = {
            "device": name,
            "dry_run": dry,
            "date_utc": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "commit": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip(),
            "versions": {
                "r_tsvm_kernels": __version__,
                "torch": torch.__version__,
                "cuda": torch.version.cuda,
                "python": platform.python_version(),
            },
            "rows": [],
        }

    def size(self, full: int) -> int:
        """Return `full`, or something tiny in a dry run."""
        return min(full, 64) if self.dry else full

    def random(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return normal random numbers on the device."""
        return torch.randn(*map(self.size, shape), device=self.device).to(dtype)

    def measure(
        self, name: str, run: Callable[[], Any], *, repeats: int = 10, gigabytes: float = 0.0, teraflop: float = 0.0
    ) -> None:
        """Time `run` (median, 20th and 80th percentile) and keep the row; an error becomes the row's text."""
        row: dict[str, Any] = {"name": name}
        try:
            run()
            seconds = sorted(self._once(run) for _ in range(2 if self.dry else repeats))
            median = statistics.median(seconds)
            row |= {"ms": 1e3 * median, "ms_p20": 1e3 * seconds[len(seconds) // 5]}
            row["ms_p80"] = 1e3 * seconds[-1 - len(seconds) // 5]
            if gigabytes and not self.dry:
                row["gb_per_s"] = gigabytes / median
            if teraflop and not self.dry:
                row["tflop_per_s"] = teraflop / median
        except RuntimeError as error:  # a loss is a result
            row["error"] = str(error).splitlines()[0]
        self.result["rows"].append(row)
        self.file.write_text(json.dumps(self.result, indent=1) + "\n")
        print(json.dumps(row), flush=True)

    def _once(self, run: Callable[[], Any]) -> float:
        if self.device.type != "cuda":
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3


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


def statistics_and_selection(suite: Suite) -> None:
    base = suite.random(14336, 4096, dtype=torch.bfloat16)
    tuned = [base + suite.random(14336, 4096, dtype=torch.bfloat16) / 64 for _ in range(TASKS)]
    gigabytes = 2 * base.numel() * (1 + TASKS) / 1e9
    for backend, state in explain("task_statistics", suite.device.type):
        if state == "ready":
            suite.measure(
                f"task_statistics {backend}",
                lambda backend=backend: task_statistics(base, tuned, backend=backend),
                gigabytes=gigabytes,
            )
    flat = (tuned[0] - base).float().abs().flatten()
    keep = flat.numel() // 5
    suite.measure("topk 20 %", lambda: flat.topk(keep), repeats=3, gigabytes=flat.numel() * 4 / 1e9)
    suite.measure("kthvalue", lambda: flat.kthvalue(flat.numel() - keep), repeats=3, gigabytes=flat.numel() * 4 / 1e9)
    suite.measure("sort", lambda: flat.sort(), repeats=3, gigabytes=flat.numel() * 4 / 1e9)


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


def published_tsvm(suite: Suite) -> None:
    """TSV-Merge with T full SVDs and two more for the polar factors, float32, as the published code does it."""

    def merge(deltas: list[torch.Tensor]) -> torch.Tensor:
        m, n = deltas[0].shape
        r = min(m, n)
        k = r // len(deltas)
        U, s, Vh = (deltas[0].new_zeros(shape) for shape in ((m, r), (r,), (r, n)))
        for task, delta in enumerate(deltas):
            u, sigma, vh = torch.linalg.svd(delta, full_matrices=False)
            part = slice(task * k, (task + 1) * k)
            U[:, part], s[part], Vh[part] = u[:, :k], sigma[:k], vh[:k]
        pu, _, qu = torch.linalg.svd(U, full_matrices=False)
        pv, _, qv = torch.linalg.svd(Vh, full_matrices=False)
        return pu @ qu @ torch.diag(s) @ (pv @ qv)

    for rows, columns in sorted(set(MISTRAL_LAYER)):
        deltas = [suite.random(rows, columns) for _ in range(TASKS)]
        suite.measure(f"published tsvm {rows}x{columns} T{TASKS}", lambda deltas=deltas: merge(deltas), repeats=1)


def suite_of(file: str, description: str) -> Suite:
    """Read the command line of a GPU benchmark."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/local"))
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, on the CPU")
    options = parser.parse_args()
    suite = Suite(options.out / file, options.dry_run)
    if suite.device.type != "cuda" and not options.dry_run:
        parser.error("torch sees no CUDA device; --dry-run shows that the program works")
    return suite


def main() -> None:
    suite = suite_of("ceilings.json", "Measure the ceilings of this GPU.")
    for part in (bandwidth, products, statistics_and_selection, decompositions, published_tsvm):
        part(suite)


if __name__ == "__main__":
    main()
