"""Peak memory of `rtsvm merge` for checkpoints of growing size: it must not grow with them.

    python benchmarks/engine_memory.py [--sizes 0.5 1 2 4 8] [--methods linear task_arithmetic] [--folder DIR]

For each size a base and two fine-tunes in bfloat16 are written to DIR, merged through the command line, and deleted:
8 GB want 48 GB of free disk for a while. With a disk of 1 GB/s the default sizes take a few minutes. Spectral methods
(`--methods rtsvm`) take ten minutes per GB and more: choose fewer `--sizes` for them, and another `--out`.

The peak is that of the resident memory of all processes of the merge together: program, libraries, tensors and mapped
pages of files. Exit code 1 if the largest peak is more than 20 % above the smallest, or one is above 1.5 GB and the
largest group (a tensor of the base and its fine-tuned versions).
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from memory import run_measured
from models import family, merge_command
from record import RESULTS, provenance
from rich.console import Console
from rich.table import Table

TASKS = 2
FLATNESS_LIMIT, PEAK_LIMIT = 1.2, 1.5e9


def measure(gigabytes: float, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Merge one family with every method."""
    rows = []
    with family(args.folder, gigabytes, TASKS, args.hidden) as models:
        for method in args.methods:
            out = models.base.parent / "merged"
            run = run_measured(merge_command(models.write_recipe(method), out, args.threads))
            written = sum(file.stat().st_size for file in out.glob("*.safetensors"))
            shutil.rmtree(out)
            rows.append(
                {
                    "method": method,
                    "checkpoint_bytes": models.checkpoint_bytes,
                    "largest_group_bytes": models.largest_group_bytes,
                    "written_bytes": written,
                    "seconds": run.seconds,
                    "peak_bytes": run.peak_bytes,
                    "within_limit": run.peak_bytes <= PEAK_LIMIT + models.largest_group_bytes,
                }
            )
    return rows


def flatness(rows: list[dict[str, Any]]) -> dict[str, float]:
    """By method, the largest peak as a multiple of the smallest."""
    peaks: dict[str, list[int]] = {}
    for row in rows:
        peaks.setdefault(row["method"], []).append(row["peak_bytes"])
    return {method: max(values) / min(values) for method, values in peaks.items()}


def print_table(rows: list[dict[str, Any]], console: Console) -> None:
    table = Table("method", "checkpoint", "largest group", "peak", "verdict", "wall time")
    for row in rows:
        table.add_row(
            row["method"],
            f"{row['checkpoint_bytes'] / 1e9:.2f} GB",
            f"{row['largest_group_bytes'] / 1e6:.0f} MB",
            f"{row['peak_bytes'] / 1e6:.0f} MB",
            "within the limit" if row["within_limit"] else "[bold red]TOO MUCH",
            f"{row['seconds']:.1f} s",
        )
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", type=float, default=[0.5, 1, 2, 4, 8], metavar="GB", help="per model")
    parser.add_argument("--methods", nargs="+", default=["linear", "task_arithmetic"], metavar="METHOD")
    parser.add_argument(
        "--hidden", type=int, default=2048, help="width of the models (default 2048, for 0.5 GB and up)"
    )
    parser.add_argument("--threads", type=int, help="as for rtsvm merge")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where the models are written")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON")
    args = parser.parse_args()

    rows = [row for gigabytes in args.sizes for row in measure(gigabytes, args)]
    rows.sort(key=lambda row: (row["method"], row["checkpoint_bytes"]))
    growth = flatness(rows)
    console = Console()
    console.width = max(console.width, 120)  # a log has no width of its own
    print_table(rows, console)
    for method, ratio in growth.items():
        verdict = "flat" if ratio <= FLATNESS_LIMIT else "[bold red]NOT FLAT"
        console.print(f"{method}: the largest peak is {ratio:.2f} times the smallest: {verdict}")

    report = provenance("safetensors") | {
        "tasks": TASKS,
        "hidden": args.hidden,
        "threads_asked": args.threads,
        "limits": {"largest_peak_by_smallest": FLATNESS_LIMIT, "peak_bytes_beside_largest_group": PEAK_LIMIT},
        "largest_peak_by_smallest": growth,
        "rows": rows,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    target = args.out / "engine_memory.json"
    target.write_text(json.dumps(report, indent=1) + "\n")
    console.print(f"written: {target}")
    return 0 if all(row["within_limit"] for row in rows) and max(growth.values()) <= FLATNESS_LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
