"""What the programs for a machine with a GPU share: their command line, and a file of rows that grows."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from r_tsvm_kernels.bench import Stopwatch, provenance, quartiles
from r_tsvm_kernels.bench.record import replace_json
from r_tsvm_kernels.bench.suite import SLOW

# q, k, v, o, gate, up, down of one layer of Mistral-7B, with how often each shape comes.
MISTRAL_LAYER = {"q_proj": 2, "k_proj": 2, "gate_proj": 2, "down_proj": 1}
TASKS = 3


class Suite:
    """Measures, prints and keeps rows; the file is complete after every row."""

    def __init__(self, file: Path, dry: bool) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() and not dry else "cpu")
        self.dry = dry
        self.file = file
        file.parent.mkdir(parents=True, exist_ok=True)
        if dry:
            torch.set_num_threads(1)
        self.stopwatch = Stopwatch(self.device)
        self.result: dict[str, Any] = provenance() | {"device": self.device.type, "dry_run": dry, "rows": []}

    def size(self, full: int) -> int:
        """Return `full`, or something tiny in a dry run."""
        return min(full, 64) if self.dry else full

    def random(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return normal random numbers on the device."""
        return torch.randn(*map(self.size, shape), device=self.device).to(dtype)

    def measure(
        self,
        name: str,
        run: Callable[[], Any],
        *,
        repeats: int = 10,
        gigabytes: float = 0.0,
        teraflop: float = 0.0,
        **more: Any,
    ) -> float | None:
        """Time `run` after a first call, keep the row, return the median; an error becomes the row's text.

        A call that is slow is its own first one.
        """
        row: dict[str, Any] = {"name": name, **more}
        median = None
        try:
            first = self.stopwatch.seconds(run)
            rounds = 2 if self.dry else repeats
            times = [first] if first > SLOW else [self.stopwatch.seconds(run) for _ in range(rounds)]
            row["seconds"] = quartiles(times)
            median = row["seconds"]["median"]
            if gigabytes and not self.dry:
                row["gb_per_s"] = gigabytes / median
            if teraflop and not self.dry:
                row["tflop_per_s"] = teraflop / median
        except Exception as error:  # a loss is a result, whatever the compilers and libraries raise
            row["error"] = f"{type(error).__name__}: {str(error)[:500]}"
        self.add(row)
        return median

    def add(self, row: dict[str, Any]) -> None:
        """Keep a row."""
        self.result["rows"].append(row)
        self.save()
        print(json.dumps(row), flush=True)

    def save(self) -> None:
        """Write what there is."""
        replace_json(self.file, self.result)


def arguments_of(description: str) -> argparse.ArgumentParser:
    """Return the parser of a program of the GPU suite."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/local"))
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, on the CPU")
    return parser


def suite_of(file: str, description: str, parser: argparse.ArgumentParser | None = None) -> Suite:
    """Read the command line of a program that needs a GPU, but for a dry run."""
    parser = parser or arguments_of(description)
    options = parser.parse_args()
    suite = Suite(options.out / file, options.dry_run)
    if suite.device.type != "cuda" and not options.dry_run:
        parser.error("torch sees no CUDA device; --dry-run shows that the program works")
    return suite
