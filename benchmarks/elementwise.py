"""Time stage one of R-TSVM (statistics, clipping, exact pruning) against eager torch and against memory traffic.

    python benchmarks/elementwise.py [--shapes 4096x4096 14336x4096] [--rounds 9] [--out DIR]

All sides run in turn, round by round, so that whatever else the machine does hits them alike; the ratios are those of
one round, and their median and quartiles are told. Before anything is timed, the results are compared bit by bit.

* floor: `torch.Tensor.copy_`, threaded, of as many bytes as the pipeline must move: every input is read once and every
  output written once, in memory that is in use already ("warm") and in outputs allocated for it ("fresh", as ours).
* eager: our own reference, `use_backend(...="torch")`.
* kthvalue: the shortest eager version one would write. Ties at the threshold are all kept, so its result may differ.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from memory import peak_of
from record import RESULTS, provenance, quartiles, ratios
from rich.console import Console
from rich.table import Table
from torch import Tensor

from r_tsvm_kernels.bench import interleaved
from r_tsvm_kernels.dispatch import use_backend
from r_tsvm_kernels.ops import kept_count, magnitude_select, pruned_sparsity, reweight_prune, task_statistics

SEED, TASKS, DENSITY = 0, 3, 0.3

Inputs = tuple[Tensor, list[Tensor]]
Side = Callable[[], Any]


def make_inputs(shape: tuple[int, int]) -> Inputs:
    """A bfloat16 weight and fine-tuned copies: so close to it that differences are few multiples of its last place."""
    torch.manual_seed(SEED)
    base = (0.02 * torch.randn(shape)).bfloat16()
    return base, [(base.float() + 1e-3 * torch.randn(shape)).bfloat16() for _ in range(TASKS)]


def ours(base: Tensor, tuned: list[Tensor]) -> list[Tensor]:
    statistics = task_statistics(base, tuned)
    pruned_sparsity(statistics, density=DENSITY)
    return reweight_prune(base, tuned, statistics, density=DENSITY)


def eager(base: Tensor, tuned: list[Tensor]) -> list[Tensor]:
    with use_backend(task_statistics="torch", reweight_prune="torch", magnitude_select="torch"):
        return ours(base, tuned)


def with_kthvalue(base: Tensor, tuned: list[Tensor]) -> list[Tensor]:
    pruned = []
    for weight in tuned:
        delta = weight.float() - base.float()
        magnitude = delta.abs()
        mean, sd = magnitude.mean(), magnitude.std(correction=0)
        (magnitude[magnitude > mean + 3 * sd].sum() / magnitude.sum(), (magnitude <= 0.1 * mean).sum())
        delta.clamp_(-(mean + 3 * sd), mean + 3 * sd)
        drop = delta.numel() - kept_count(DENSITY, delta.numel())
        threshold = delta.abs().flatten().kthvalue(drop + 1).values
        pruned.append(delta.masked_fill_(delta.abs() < threshold, 0))
    return pruned


def floors(base: Tensor, tuned: list[Tensor]) -> tuple[int, dict[str, Side]]:
    """The bytes that must move, and copies that move as many: half are read, half written."""
    moved = sum(t.nbytes for t in [base, *tuned]) + sum(4 * t.numel() for t in tuned)
    source = torch.ones(moved // 2, dtype=torch.uint8)
    target = torch.ones_like(source)
    return moved, {"floor, warm": lambda: target.copy_(source), "floor, fresh": source.clone}


def sides_of(base: Tensor, tuned: list[Tensor]) -> dict[str, Side]:
    statistics = task_statistics(base, tuned)
    keep = kept_count(DENSITY, base.numel())
    widened = tuned[0].float()
    return {
        "ours": lambda: ours(base, tuned),
        "eager": lambda: eager(base, tuned),
        "kthvalue": lambda: with_kthvalue(base, tuned),
        "task_statistics": lambda: task_statistics(base, tuned),
        "reweight_prune": lambda: reweight_prune(base, tuned, statistics, density=DENSITY),
        "reweight_prune, density 1": lambda: reweight_prune(base, tuned, statistics),
        "magnitude_select, bfloat16": lambda: magnitude_select(tuned[0], keep),
        "magnitude_select, float32": lambda: magnitude_select(widened, keep),
        "magnitude_select, difference": lambda: magnitude_select(tuned[0], keep, base=base),
    }


def same_bits(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in zip(first, second, strict=True))


def peak_extra_bytes(side: str, shape: tuple[int, int]) -> int:
    """Peak memory of one run beyond inputs and results, measured in a process of its own."""
    command = [sys.executable, __file__, "--peak-of", side, "--shapes", "x".join(map(str, shape))]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def print_peak(side: str, shape: tuple[int, int]) -> None:
    inputs = make_inputs((64, 64))
    functions = {"ours": ours, "eager": eager, "kthvalue": with_kthvalue}
    functions[side](*inputs)  # loads the libraries
    base = torch.zeros(shape, dtype=torch.bfloat16)
    base.view(torch.int16).copy_(torch.arange(base.numel()).view(shape) % 997 + 15_000)
    tuned = [base * (1 + 2**-6), base * (1 - 2**-5), base * 1.25]
    results, peak = peak_of(lambda: functions[side](base, tuned))
    print(max(0, peak - sum(t.nbytes for t in results)))


def measure(shape: tuple[int, int], rounds: int, slow_rounds: int) -> dict[str, Any]:
    base, tuned = make_inputs(shape)
    if not same_bits(ours(base, tuned), eager(base, tuned)):
        raise SystemExit("our result is not the reference's: nothing was timed")
    moved, floor = floors(base, tuned)
    sides = floor | sides_of(base, tuned)
    for side in sides.values():
        side()
    times = interleaved(sides, dict.fromkeys(sides, rounds) | dict.fromkeys(("eager", "kthvalue"), slow_rounds))
    return {
        "shape": list(shape),
        "tasks": TASKS,
        "density": DENSITY,
        "bytes_of_floor": moved,
        "seconds": {name: quartiles(values) for name, values in times.items()},
        "ratios": {
            "eager / ours": ratios(times["eager"], times["ours"]),
            "kthvalue / ours": ratios(times["kthvalue"], times["ours"]),
            "ours / floor, fresh": ratios(times["ours"], times["floor, fresh"]),
            "ours / floor, warm": ratios(times["ours"], times["floor, warm"]),
            "reweight_prune / floor, fresh": ratios(times["reweight_prune"], times["floor, fresh"]),
        },
        "peak_extra_bytes": {side: peak_extra_bytes(side, shape) for side in ("ours", "eager", "kthvalue")},
    }


def print_tables(row: dict[str, Any], console: Console) -> None:
    title = f"{row['shape'][0]}x{row['shape'][1]} bfloat16, T={TASKS}; floor {row['bytes_of_floor'] / 2**20:.0f} MiB"
    table = Table("", "median", "quartiles", title=title)
    for name, q in row["seconds"].items():
        table.add_row(name, f"{1e3 * q['median']:.1f} ms", f"{1e3 * q['q1']:.1f} - {1e3 * q['q3']:.1f}")
    for name, q in row["ratios"].items():
        table.add_row(name, f"{q['median']:.2f}", f"{q['q1']:.2f} - {q['q3']:.2f}")
    for name, size in row["peak_extra_bytes"].items():
        table.add_row(f"peak extra memory, {name}", f"{size / 2**20:.0f} MiB", "")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["4096x4096", "14336x4096"], metavar="MxN")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--slow-rounds", type=int, default=3, help="rounds of the eager versions")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON")
    parser.add_argument("--peak-of", choices=["ours", "eager", "kthvalue"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if min(args.rounds, args.slow_rounds) < 2:
        parser.error("a spread needs at least two rounds")
    shapes = [tuple(map(int, shape.split("x"))) for shape in args.shapes]
    if args.peak_of:
        print_peak(args.peak_of, shapes[0])
        return

    report = provenance() | {"seed": SEED, "rows": [measure(shape, args.rounds, args.slow_rounds) for shape in shapes]}
    for row in report["rows"]:
        print_tables(row, Console())
    args.out.mkdir(parents=True, exist_ok=True)
    target = args.out / "elementwise.json"
    target.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written: {target}")


if __name__ == "__main__":
    main()
