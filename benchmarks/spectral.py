"""Time TSV-Merge on the CPU against FusionBench's own function, and see how the time grows.

    python -m benchmarks.spectral [--sizes 1024 1536 2048] [--rounds 5] [--peer-python PATH] [--json FILE]

The peer runs in its own environment (benchmarks/peers/fusion_bench_env.sh), in a process that waits between its turns,
with the same number of threads, on the same matrices. Both results are compared with a float64 SVD. FusionBench's
function has one rank, k = min(m, n) // T; our smaller ranks are compared with the same run of it, because adaptive
ranks replace that run.

* spectra: white noise (``flat``: no gap anywhere, the bases ill-conditioned) and a power law i^-0.3. `float32 products`
  is our time in units of one float32 product of that size, measured in the same round.
* growth: k = r // T, with n at T = 3, and with T at n = 768.
* LoRA: three rank-16 updates of a 4096 x 4096 weight, given as factors; the dense routes run once.
"""

from __future__ import annotations

import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.program import Program, Server, Turns, finish
from r_tsvm_kernels.bench import Results, Row, published, ratios, row, worst_error
from r_tsvm_kernels.linalg import Factored, tsv_merge
from tests.spectra import spectrum

PEER, OURS = "FusionBench", "eigen"
TASKS, LORA_RANK, SIZE_OF_COUNTS, PARITY = 3, 16, 768, "k = r // T"
SHARES = {PARITY: 1.0, "sum(k) = r / 2": 0.5, "sum(k) = r / 8": 0.125}  # of min(m, n), for all ranks together


class FusionBench:
    """FusionBench's function in a process of its environment."""

    def __init__(self, python: Path, folder: Path) -> None:
        self.folder = folder
        self.server = Server([python, "-m", "benchmarks.peers.fusion_bench_tsvm", "--serve"])

    def load(self, matrices: list[Tensor]) -> None:
        save_file({f"case/{t}": matrix for t, matrix in enumerate(matrices)}, self.folder / "in.safetensors")
        self.server.ask(["load", str(self.folder / "in.safetensors")])

    def seconds(self) -> float:
        return float(self.server.ask(["run"]))

    def result(self) -> Tensor:
        self.server.ask(["save", str(self.folder / "out.safetensors")])
        return load_file(self.folder / "out.safetensors")["case"]


def timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def task_matrices(kind: str, n: int, tasks: int) -> list[Tensor]:
    return [1e-3 * spectrum(kind, n, n, seed) for seed in range(tasks)]


def compare(peer: FusionBench, series: str, kind: str, n: int, tasks: int, rounds: int, shares: list[str]) -> list[Row]:
    """Time our ranks and FusionBench in interleaved rounds."""
    matrices = task_matrices(kind, n, tasks)
    ranks = {name: [int(SHARES[name] * n / tasks)] * tasks for name in shares}
    peer.load(matrices)
    merges, turns, products = {}, {name: Turns() for name in shares}, []
    for _ in range(rounds):
        theirs = peer.seconds()
        products.append(min(timed(lambda: matrices[0] @ matrices[1]) for _ in range(3)))
        for name, chosen in ranks.items():

            def run(name: str = name, chosen: list[int] = chosen) -> None:
                merges[name] = tsv_merge(matrices, chosen)

            turns[name].add(PEER, theirs)
            turns[name].add(OURS, timed(run))
    rows = []
    for name, chosen in ranks.items():
        case = {"shape": (n, n), "dtype": "float32",
                "options": {"series": series, "spectrum": kind, "ranks": name, "tasks": tasks}}  # fmt: skip
        exact = [published.tsv_merge([matrix.double() for matrix in matrices], chosen)]
        certificate = merges[name].certificate
        notes = {"k": chosen[0], "estimated_error": certificate.error, "route": certificate.route,
                 "escalations": list(certificate.escalations),
                 "basis_condition": max(certificate.basis_condition)}  # fmt: skip
        rows += turns[name].rows("tsv_merge", [PEER], [OURS], **case)
        in_products = ratios(turns[name].seconds(OURS), products)
        rows.append(row("tsv_merge", OURS, "products", in_products, unit="float32 products", **case))
        rows.append(row("tsv_merge", OURS, "error", worst_error([merges[name].matrix], exact), notes=notes, **case))
        if name == PARITY:
            rows.append(row("tsv_merge", PEER, "error", worst_error([peer.result()], exact), role="peer", **case))
    return rows


def lora(peer: FusionBench, n: int, rounds: int) -> list[Row]:
    """Time a merge of adapters from their factors."""
    torch.manual_seed(0)
    tasks = [Factored(torch.randn(n, LORA_RANK), torch.randn(LORA_RANK, n) / n) for _ in range(TASKS)]
    dense, ranks = [task.dense() for task in tasks], [LORA_RANK] * TASKS
    case = {"shape": (n, n), "dtype": "float32",
            "options": {"series": "LoRA", "ranks": f"k = {LORA_RANK}", "tasks": TASKS}}  # fmt: skip
    merged = tsv_merge(tasks, ranks).matrix
    ours = [timed(lambda: tsv_merge(tasks, ranks)) for _ in range(rounds)]
    peer.load(dense)
    theirs, in_turn = peer.seconds(), timed(lambda: tsv_merge(tasks, ranks))
    exact = published.tsv_merge([task.double() for task in dense], ranks)
    return [
        row("tsv_merge", "factors", "time", ours, **case),
        row("tsv_merge", OURS, "time", timed(lambda: tsv_merge(dense, ranks)), **case),
        row("tsv_merge", PEER, "time", theirs, role="peer", **case),
        row("tsv_merge", "factors", "speed-up", theirs / in_turn, notes={"against": PEER}, **case),
        row("tsv_merge", "factors", "error", worst_error([merged], [exact]), **case),
    ]


def measure(peer: FusionBench, args: Namespace) -> Iterator[list[Row]]:
    for kind in ("flat", "power 0.3"):
        for n in args.sizes:
            yield compare(peer, "spectra", kind, n, TASKS, args.rounds, list(SHARES))
    for n in sorted({n for n in (256, 384, 512, 768, 1024) if n <= max(args.sizes)} | set(args.sizes)):
        yield compare(peer, "growth with n", "flat", n, TASKS, args.rounds, [PARITY])
    for tasks in (2, 3, 4, 6, 8):
        yield compare(peer, "growth with T", "flat", min(SIZE_OF_COUNTS, *args.sizes), tasks, args.rounds, [PARITY])
    yield lora(peer, args.lora_size, args.rounds)


def main() -> int:
    program = Program(__doc__, "spectral.json", "fusion-bench", rounds=5)
    program.parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 1536, 2048])
    program.parser.add_argument("--lora-size", type=int, default=4096)
    args = program.arguments()
    results = Results(args.json, ("numpy", "safetensors"), replace=True)
    with tempfile.TemporaryDirectory() as folder:
        peer = FusionBench(args.peer_python, Path(folder))
        results.circumstances["versions"] |= {"fusion-bench": peer.server.versions["fusion_bench"]}
        for rows in measure(peer, args):
            results.add(rows)
        peer.server.close()
    return finish(results)


if __name__ == "__main__":
    sys.exit(main())
