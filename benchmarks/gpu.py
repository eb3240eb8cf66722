"""Code that the programs for a machine with a GPU share: the command line, and results that grow row by row."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from r_tsvm_kernels.bench import Results, Row, Stopwatch, row
from r_tsvm_kernels.bench.table import cell

TASKS = 3
SLOW = 5.0  # seconds; a call that takes longer is timed once


class Suite:
    """Measures, prints and keeps rows; the file is complete after every row."""

    def __init__(self, file: Path, dry: bool) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() and not dry else "cpu")
        self.dry = dry
        if dry:
            torch.set_num_threads(1)
        self.stopwatch = Stopwatch(self.device)
        self.results = Results(file, replace=True)

    def size(self, full: int) -> int:
        """Return `full`, or something tiny in a dry run."""
        return min(full, 64) if self.dry else full

    def random(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return normal random numbers on the device."""
        return torch.randn(*map(self.size, shape), device=self.device).to(dtype)

    def measure(
        self,
        name: str,
        provider: str,
        run: Callable[[], Any],
        *,
        rounds: int = 10,
        bytes: float = 0.0,
        flops: float = 0.0,
        role: str = "torch",
        **options: Any,
    ) -> None:
        """Time `run` after a first call and keep its rows; a failure becomes the reason of a missing time.

        A slow call has no separate first call. `bytes` and `flops` are the work of a call, for its rate.
        """
        case: dict[str, Any] = {"role": role, "options": options}
        try:
            first = self.stopwatch.seconds(run)
            times = [first] if first > SLOW else [self.stopwatch.seconds(run) for _ in range(2 if self.dry else rounds)]
        except Exception as error:  # a loss is a result, whatever the compilers and libraries raise
            reason = f"{type(error).__name__}: {str(error)[:500]}"
            self.add([row(name, provider, "time", None, notes={"status": "failed", "reason": reason}, **case)])
            return
        rows = [row(name, provider, "time", times, **case)]
        if bytes and not self.dry:
            rows.append(row(name, provider, "rate", [bytes / value for value in times], **case))
        if flops and not self.dry:
            rows.append(row(name, provider, "arithmetic", [flops / value for value in times], **case))
        self.add(rows)

    def add(self, rows: list[Row]) -> None:
        """Keep rows."""
        options = {"dry_run": True} if self.dry else {}
        self.results.add(found | {"options": found["options"] | options} for found in rows)
        for found in rows:
            print(found["name"], found["provider"], found["options"], found["metric"], cell(found), flush=True)


def arguments_of(description: str | None) -> argparse.ArgumentParser:
    """Return the parser of a program of the GPU suite."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/local"), help="folder for the results")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, on the CPU")
    return parser


def suite_of(file: str, parser: argparse.ArgumentParser) -> tuple[Suite, argparse.Namespace]:
    """Read the command line of a program that needs a GPU, except in a dry run."""
    options = parser.parse_args()
    suite = Suite(options.out / file, options.dry_run)
    if suite.device.type != "cuda" and not options.dry_run:
        parser.error("torch sees no CUDA device; --dry-run shows that the program works")
    return suite, options
