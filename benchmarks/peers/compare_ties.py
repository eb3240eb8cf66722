"""Check and time the element-wise merges against mergekit's own functions on the same matrices.

    python benchmarks/peers/compare_ties.py [--peer-python PATH] [--shape 4096x4096] [--rounds 5] [--out DIR]

First both sides merge float32 matrices, where their definitions agree: a case is right when the updates of both are
within 1e-6 of our reference in float64, relative to its Frobenius norm. Elements that are tied at a threshold are
left out of this: mergekit keeps any of them. DARE draws other masks on the two sides, and mergekit scales by the L1
norms instead of 1 / density; there only our side is held against the reference.

Then both merge bfloat16 matrices and are timed in turn, each in a process of its own with as many threads, result in
bfloat16. mergekit forms and sums the task vectors in bfloat16, we in float32; `error` tells what that costs.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from comparing import Program, spread, verdict, wide_console, write
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from memory import peak_of
from record import provenance, quartiles, ratios

from r_tsvm_kernels.dispatch import use_backend
from r_tsvm_kernels.ops import MagnitudeSelection, Sparsifier, elect_and_sum, magnitude_select

PEER = Path(__file__).with_name("mergekit_merge.py")
SEED, TASKS, DENSITY, GAMMA = 0, 3, 0.3, 0.01
CHECKED_SHAPE = (1024, 768)
ERROR_LIMIT = 1e-6

# mergekit's name: its parameters, then our election and whether we normalize.
SHARED = {"weight": 1.0, "density": DENSITY}
METHODS: dict[str, tuple[dict[str, Any], str, bool]] = {
    "ties": (SHARED, "sum", True),
    "breadcrumbs_ties": (SHARED | {"gamma": GAMMA}, "sum", False),
    "breadcrumbs": (SHARED | {"gamma": GAMMA}, "none", False),
    "dare_ties": (SHARED, "sum", False),
    "dare_linear": (SHARED, "none", False),
}

Inputs = tuple[Tensor, list[Tensor]]


def make_inputs(shape: tuple[int, int], dtype: torch.dtype) -> Inputs:
    torch.manual_seed(SEED)
    base = (0.02 * torch.randn(shape)).to(dtype)
    return base, [(base.float() + 1e-3 * torch.randn(shape)).to(dtype) for _ in range(TASKS)]


# --- our side --------------------------------------------------------------------------------------------------


def sparsifiers(method: str, base: Tensor, tuned: list[Tensor]) -> list[Sparsifier]:
    # As many elements as mergekit keeps: it rounds down.
    kept, dropped = int(DENSITY * base.numel()), int(GAMMA * base.numel())
    if method.startswith("dare"):
        return [Sparsifier(probability=DENSITY, rescale=1 / DENSITY, stream=task) for task in range(len(tuned))]
    if method == "ties":
        return [Sparsifier(largest=magnitude_select(weight, kept, base=base)) for weight in tuned]
    return [
        Sparsifier(
            largest=magnitude_select(weight, kept + dropped, base=base),
            outliers=magnitude_select(weight, dropped, base=base),
        )
        for weight in tuned
    ]


def ours(method: str, base: Tensor, tuned: list[Tensor]) -> Tensor:
    _, election, normalize = METHODS[method]
    keep = sparsifiers(method, base, tuned)
    weights = [1.0] * len(tuned)
    return elect_and_sum(base, tuned, weights, elect=election, normalize=normalize, keep=keep).to(base.dtype)


def truth(method: str, base: Tensor, tuned: list[Tensor]) -> Tensor:
    """The update by our reference in float64."""
    with use_backend(magnitude_select="torch", elect_and_sum="torch"):
        wide = base.double()
        return ours(method, wide, [weight.double() for weight in tuned]) - wide


def tied(method: str, base: Tensor, tuned: list[Tensor]) -> Tensor:
    """Mask of the elements whose magnitude equals a threshold of a task."""
    mask = torch.zeros(base.shape, dtype=torch.bool)
    for weight, keep in zip(tuned, sparsifiers(method, base, tuned), strict=True):
        for selection in (keep.largest, keep.outliers):
            if isinstance(selection, MagnitudeSelection):
                mask |= (weight - base).abs() == selection.threshold
    return mask


# --- the peer --------------------------------------------------------------------------------------------------


class Peer:
    """A process in the peer's environment that holds the inputs and merges them when told to."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.versions = self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("the peer's process ended")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def merge(self, method: str, save: Path | None = None, measure_peak: bool = False) -> dict[str, Any]:
        """Merge once; return the seconds it took, or the peak memory. `save` is the file for the result."""
        assert self._process.stdin is not None
        order = {"method": method, "parameters": METHODS[method][0], "save": save and str(save)}
        print(json.dumps(order | {"measure_peak": measure_peak}), file=self._process.stdin, flush=True)
        return self._answer()

    def merged(self, method: str, folder: Path) -> Tensor:
        """Merge once; return the result."""
        target = folder / "merged.safetensors"
        self.merge(method, target)
        return load_file(target)["merged"]


@contextmanager
def peer_with(python: Path, inputs: Inputs, folder: Path) -> Iterator[Peer]:
    source = folder / "inputs.safetensors"
    base, tuned = inputs
    save_file({"base": base} | {str(task): weight for task, weight in enumerate(tuned)}, source)
    command = [str(python), str(PEER), str(source)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield Peer(process)
        process.communicate()


# --- the comparison --------------------------------------------------------------------------------------------


def errors(method: str, inputs: Inputs, peer_merged: Tensor, without: Tensor | None = None) -> dict[str, float | None]:
    """Of both updates, relative to the reference in float64; None for the peer where its mask is another one."""
    base, tuned = inputs
    expected = truth(method, base, tuned)

    def error(merged: Tensor) -> float:
        gap = merged.double() - base.double() - expected
        if without is not None:
            gap.masked_fill_(without, 0)
        return float(gap.norm() / expected.norm())

    comparable = not method.startswith("dare")
    return {"ours": error(ours(method, base, tuned)), "peer": error(peer_merged) if comparable else None}


def check(python: Path) -> dict[str, dict[str, Any]]:
    # From 0, so that the update does not lose bits to the base.
    base, tuned = make_inputs(CHECKED_SHAPE, torch.float32)
    inputs = torch.zeros_like(base), [weight - base for weight in tuned]
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name, peer_with(python, inputs, Path(name)) as peer:
        for method in METHODS:
            ties = tied(method, *inputs)
            row = errors(method, inputs, peer.merged(method, Path(name)), ties)
            right = all(error is None or error <= ERROR_LIMIT for error in row.values())
            rows[method] = {"errors": row, "left_out": int(ties.sum()), "right": right}
    return rows


def measure(python: Path, shape: tuple[int, int], rounds: int) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    inputs = make_inputs(shape, torch.bfloat16)
    times: dict[str, dict[str, list[float]]] = {method: {"ours": [], "peer": []} for method in METHODS}
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name, peer_with(python, inputs, Path(name)) as peer:
        for method in METHODS:  # also warms up
            rows[method] = {"errors_bfloat16": errors(method, inputs, peer.merged(method, Path(name)))}
        for _ in range(rounds):
            for method in METHODS:
                start = time.perf_counter()
                ours(method, *inputs)
                times[method]["ours"].append(time.perf_counter() - start)
                times[method]["peer"].append(peer.merge(method)["seconds"])
        for method in METHODS:
            rows[method] |= {
                "seconds": {side: quartiles(values) for side, values in times[method].items()},
                "ratio": ratios(times[method]["peer"], times[method]["ours"]),
                "peak_bytes": {
                    "ours": peak_of(lambda method=method: ours(method, *inputs))[1],  # type: ignore[misc]
                    "peer": peer.merge(method, measure_peak=True)["peak_bytes"],
                },
            }
        return rows, peer.versions


def print_table(rows: dict[str, dict[str, Any]], title: str, console: Console) -> None:
    columns = ("method", "verdict", "ours", "mergekit", "ratio", "quartiles", "peak", "mergekit", "error", "mergekit")
    table = Table(*columns, title=title)
    for method, row in rows.items():
        seconds, peaks = row["seconds"], row["peak_bytes"]
        table.add_row(
            method,
            verdict(row["right"]),
            *(f"{1e3 * seconds[side]['median']:.0f} ms" for side in ("ours", "peer")),
            *spread(row["ratio"]),
            *(f"{peaks[side] / 2**20:.0f} MiB" for side in ("ours", "peer")),
            *("-" if error is None else f"{error:.0e}" for error in row["errors_bfloat16"].values()),
        )
    console.print(table)


def main() -> int:
    program = Program(__doc__, "mergekit", rounds=5)
    program.parser.add_argument("--shape", default="4096x4096", metavar="MxN")
    args = program.arguments()
    rows, columns = map(int, args.shape.split("x"))

    checked = check(args.peer_python)
    measured, versions = measure(args.peer_python, (rows, columns), args.rounds)
    results = {method: checked[method] | measured[method] for method in METHODS}
    console = wide_console(120)
    print_table(results, f"{args.shape} bfloat16, T={TASKS}, density {DENSITY}", console)

    report = provenance("safetensors") | {
        "peer_versions": versions,
        "seed": SEED,
        "limits": {"errors": ERROR_LIMIT, "checked_shape": CHECKED_SHAPE},
        "shape": [rows, columns],
        "tasks": TASKS,
        "density": DENSITY,
        "gamma": GAMMA,
        "methods": results,
    }
    write(report, args.out / "ties_vs_mergekit.json", console)
    return 0 if all(row["right"] for row in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
