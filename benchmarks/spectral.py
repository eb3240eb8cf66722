"""Time TSV-Merge on the CPU against FusionBench's own function, side by side, and see how the time grows.

    python benchmarks/spectral.py [--sizes 1024 1536 2048] [--rounds 5] [--peer-python PATH] [--out DIR]

The peer runs in its own environment (benchmarks/peers/fusion_bench_env.sh) in a process that waits between its turns;
both sides take turns round by round, with the same number of threads, on the same matrices. The ratios are those of
one round, and their median and quartiles are told. Before anything is timed, both results are compared with a float64
SVD. The peer has one rank, k = min(m, n) // T; ours at smaller ranks is compared with the same run of the peer, which
is what a user of adaptive ranks would have had to wait for.

* spectra: white noise (``flat``: no gap anywhere, the bases ill-conditioned) and a power law i^-0.3.
* sgemm: the time in units of one float32 product of that size, measured in the same round.
* growth: time against n at T = 3 and against T at n = 768, with the exponent of a fitted power.
* LoRA: three rank-16 updates of a 4096 x 4096 weight, given as factors; the dense routes are timed once.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from record import RESULTS, ROOT, provenance, quartiles, ratios
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor

from r_tsvm_kernels.bench import published
from r_tsvm_kernels.bench.record import exponent
from r_tsvm_kernels.linalg import Factored, TsvMerge, tsv_merge

PEER = ROOT / "benchmarks" / "peers" / "fusion_bench_tsvm.py"
SEED, TASKS = 0, 3
# Share of min(m, n) that all ranks together take.
SHARES = {"parity, k = r // T": 1.0, "sum(k) = r / 2": 0.5, "sum(k) = r / 8": 0.125}


class Peer:
    """FusionBench's function in a process of its environment, one call at a time."""

    def __init__(self, python: Path, folder: Path) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
        self.folder = folder
        self.process = subprocess.Popen(
            [python, PEER, "--serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.versions: dict[str, str] = json.loads(self._line())

    def load(self, matrices: list[Tensor]) -> None:
        save_file({f"case/{t}": matrix for t, matrix in enumerate(matrices)}, self.folder / "in.safetensors")
        self._ask(["load", str(self.folder / "in.safetensors")])

    def seconds(self) -> float:
        return float(self._ask(["run"]))

    def result(self) -> Tensor:
        self._ask(["save", str(self.folder / "out.safetensors")])
        return load_file(self.folder / "out.safetensors")["case"]

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)

    def _ask(self, command: list[str]) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return json.loads(self._line())

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("the peer's process ended; its message is above")
        return line


def make(kind: str, m: int, n: int, tasks: int) -> list[Tensor]:
    torch.manual_seed(SEED)
    if kind == "flat":
        return [1e-3 * torch.randn(m, n) for _ in range(tasks)]
    r = min(m, n)
    falling = torch.arange(1, r + 1, dtype=torch.float64) ** -0.3

    def basis(rows: int) -> Tensor:
        return torch.linalg.qr(torch.randn(rows, r, dtype=torch.float64)).Q

    return [((basis(m) * falling) @ basis(n).mT).float() for _ in range(tasks)]


def timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def error(merged: Tensor, exact: Tensor) -> float:
    return float((merged.double() - exact).norm() / exact.norm())


def compare(kind: str, n: int, rounds: int, peer: Peer | None) -> list[dict[str, Any]]:
    matrices = make(kind, n, n, TASKS)
    ranks = {name: int(share * n / TASKS) for name, share in SHARES.items()}
    merges: dict[str, TsvMerge] = {}
    times: dict[str, list[float]] = {name: [] for name in ("peer", "sgemm", *ranks)}
    if peer:
        peer.load(matrices)
    for _ in range(rounds):
        if peer:
            times["peer"].append(peer.seconds())
        times["sgemm"].append(min(timed(lambda: matrices[0] @ matrices[1]) for _ in range(3)))
        for name, rank in ranks.items():

            def run(name: str = name, rank: int = rank) -> None:
                merges[name] = tsv_merge(matrices, [rank] * TASKS)

            times[name].append(timed(run))
    rows = []
    for name, rank in ranks.items():
        exact = published.tsv_merge([matrix.double() for matrix in matrices], [rank] * TASKS)
        certificate = merges[name].certificate
        rows.append({
            "spectrum": kind, "n": n, "tasks": TASKS, "ranks": name, "k": rank,
            "error": error(merges[name].matrix, exact), "estimated_error": certificate.error,
            "route": certificate.route, "escalations": list(certificate.escalations),
            "basis_condition": max(certificate.basis_condition),
            "seconds": quartiles(times[name]), "sgemm": ratios(times[name], times["sgemm"]),
        })  # fmt: skip
        if peer:
            rows[-1]["peer_seconds"] = quartiles(times["peer"])
            rows[-1]["peer / ours"] = ratios(times["peer"], times[name])
            if rank == ranks["parity, k = r // T"]:
                rows[-1]["peer_error"] = error(peer.result(), exact)
    return rows


def growth(sizes: list[int], tasks: list[int], rounds: int, peer: Peer | None) -> dict[str, Any]:
    """Time at k = r // T against n, and against T."""
    found: dict[str, Any] = {}
    for axis, cases in (("n", [(n, TASKS) for n in sizes]), ("T", [(768, t) for t in tasks])):
        rows = []
        for n, count in cases:
            matrices = make("flat", n, n, count)
            if peer:
                peer.load(matrices)
            ours, theirs = [], []
            for _ in range(rounds):
                if peer:
                    theirs.append(peer.seconds())
                ours.append(timed(lambda m=matrices, k=n // count, t=count: tsv_merge(m, [k] * t)))
            rows.append({"n": n, "T": count, "ours": quartiles(ours)} | ({"peer": quartiles(theirs)} if peer else {}))
        sides = ("ours", "peer") if peer else ("ours",)
        found[axis] = {
            "rows": rows,
            "exponent": {side: exponent([r[axis] for r in rows], [r[side]["median"] for r in rows]) for side in sides},
        }
    return found


def lora(n: int, rank: int, rounds: int, peer: Peer | None) -> dict[str, Any]:
    torch.manual_seed(SEED)
    tasks = [Factored(torch.randn(n, rank), torch.randn(rank, n) / n) for _ in range(TASKS)]
    dense = [task.dense() for task in tasks]
    tsv_merge(tasks, [rank] * TASKS)
    ours = [timed(lambda: tsv_merge(tasks, [rank] * TASKS)) for _ in range(rounds)]
    exact = tsv_merge(
        [task.dense() for task in [Factored(t.left.double(), t.right.double()) for t in tasks]], [rank] * 3
    )
    row = {
        "n": n, "rank": rank, "seconds": quartiles(ours),
        "error": error(tsv_merge(tasks, [rank] * TASKS).matrix, exact.matrix),
        "ours_dense_seconds": timed(lambda: tsv_merge(dense, [rank] * TASKS)),
    }  # fmt: skip
    if peer:
        peer.load(dense)
        row["peer_seconds"] = peer.seconds()
        row["peer / ours"] = row["peer_seconds"] / row["seconds"]["median"]
    return row


def print_tables(report: dict[str, Any], console: Console) -> None:
    table = Table("spectrum", "n", "ranks", "seconds", "sgemm", "peer / ours", "error", "peer", "route")
    for row in report["rows"]:
        speed = row.get("peer / ours")
        table.add_row(
            row["spectrum"], str(row["n"]), row["ranks"], f"{row['seconds']['median']:.3f}",
            f"{row['sgemm']['median']:.0f}",
            f"{speed['median']:.2f} ({speed['q1']:.2f} - {speed['q3']:.2f})" if speed else "",
            f"{row['error']:.0e}", f"{row['peer_error']:.0e}" if "peer_error" in row else "", row["route"],
        )  # fmt: skip
    console.print(table)
    for axis, found in report["growth"].items():
        console.print(f"time ~ {axis}^p:", {side: round(p, 2) for side, p in found["exponent"].items()})
    console.print("LoRA:", {key: value for key, value in report["lora"].items() if key != "seconds"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default_python = ROOT / ".venv-fusion-bench" / "bin" / "python"
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 1536, 2048])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peer-python", type=Path, default=default_python, help="Python of the peer's environment")
    parser.add_argument("--no-peer", action="store_true", help="time ours alone")
    parser.add_argument("--lora-size", type=int, default=4096)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for spectral.json")
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error("a spread needs at least two rounds")
    if not args.no_peer and not args.peer_python.exists():
        parser.error(f"no {args.peer_python}: run benchmarks/peers/fusion_bench_env.sh first, or pass --no-peer")
    with tempfile.TemporaryDirectory() as folder:
        peer = None if args.no_peer else Peer(args.peer_python, Path(folder))
        report = provenance("numpy", "safetensors")
        report |= {"seed": SEED, "peer_versions": peer.versions if peer else {}}
        report["rows"] = [
            row for kind in ("flat", "power 0.3") for n in args.sizes for row in compare(kind, n, args.rounds, peer)
        ]
        small = [n for n in (256, 384, 512, 768, 1024) if n <= max(args.sizes)] + args.sizes
        report["growth"] = growth(sorted(set(small)), [2, 3, 4, 6, 8], max(2, args.rounds // 2), peer)
        report["lora"] = lora(args.lora_size, 16, args.rounds, peer)
        if peer:
            peer.close()
    print_tables(report, Console(width=130))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "spectral.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
