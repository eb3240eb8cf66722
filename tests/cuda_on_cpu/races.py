"""Runs the CUDA kernels with real threads under the thread sanitizer: races.py MODULE, built by emulated_cuda.build.

Prints a line for every case that is run to its end: "right", or "wrong" if the result is not the reference's bits; then
what became of them all: "ok", "race" or "wrong". Then for every barrier of the sources the same, with the barrier left
out: "race" if the sanitizer misses it. What it found goes to stderr.
"""

import contextlib
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import emulated_cuda
from compare import same_bits
from variants import DTYPES

from r_tsvm_kernels.ops import (
    Sparsifier,
    elect_and_sum,
    kept_count,
    magnitude_ranks,
    magnitude_select,
    reweight_prune,
    task_statistics,
)

RACE = 66  # the sanitizer's exit status


def same(op: Callable, *arguments, **options) -> bool:
    """Compare the emulated kernel with the reference, bit for bit."""
    got, expected = (op(*arguments, **options, backend=backend) for backend in ("cuda", "torch"))
    if isinstance(got, torch.Tensor):
        got, expected = [got], [expected]
    elif not isinstance(got, list):
        got, expected = (list(vars(result).values()) for result in (got, expected))
    return all(same_bits(g, e) for g, e in zip(got, expected, strict=True))


def selected(*arguments, **options) -> bool:
    pairs = (magnitude_select(*arguments, **options, backend=backend) for backend in ("cuda", "torch"))
    return all(same_bits(g.threshold, e.threshold) and same_bits(g.ties, e.ties) for g, e in zip(*pairs, strict=True))


def cases() -> Iterator[tuple[str, Callable[[], bool]]]:
    """Yield every kernel in every dtype: few elements, but more than a slice and the rows of all blocks."""
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        base = torch.randn(2100).to(dtype)
        tuned = [(base + torch.randint(-3, 4, (2100,)) / 8).to(dtype) for _ in range(2)]  # ties
        deltas = [t.double() - base.double() for t in tuned]
        keep = [Sparsifier(largest=magnitude_select(delta, kept_count(0.4, 2100), backend="torch")) for delta in deltas]
        summary = task_statistics(base, tuned)
        for elect in ("none", "sum"):
            yield (
                f"elect_and_sum {elect} {name}",
                lambda b=base, t=tuned, k=keep, e=elect: same(
                    elect_and_sum, b, t, [1.0, 0.5], elect=e, sparsifiers=k, out_dtype=b.dtype
                ),
            )
        yield f"magnitude_select {name}", lambda t=tuned: selected(t[0], [5, 700])
        yield f"magnitude_ranks {name}", lambda t=tuned: same(magnitude_ranks, t[0].reshape(10, 210))
        yield (
            f"reweight_prune {name}",
            lambda b=base, t=tuned, s=summary: same(reweight_prune, b, t, s, density=[0.4, 0.01]),
        )
    yield "magnitude_select, differences", lambda: selected(tuned[0], [5, 700], base=base)
    yield "magnitude_select, many slices", lambda: selected(torch.randn(20_000), [700])
    yield "magnitude_select, many slices of 16 bits", lambda: selected(torch.randn(10_000).half(), [700])
    yield "magnitude_ranks in the workspace", lambda: same(magnitude_ranks, torch.randn(2, 4300).double())


def run(begin: str = "") -> bool:
    """Run the cases whose names have this prefix."""
    results = []
    for name, body in cases():
        if name.startswith(begin):
            results.append(body())
            print(f"{name}: {'right' if results[-1] else 'wrong'}", flush=True)
    return all(results)


def in_a_child(body: Callable[[], bool]) -> str:
    """Run `body` in a process of its own, which ends with the first race."""
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if body() else 1)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return {0: "ok", RACE: "race"}.get(status, "wrong")


def without(place: str) -> bool:
    os.environ["CUDA_ON_CPU_WITHOUT"] = place
    # What the headers hold is used by several kernels, by different ones in different ways.
    file = place.split(".cu")[0]
    ops = {"reduce": ["magnitude_select", "reweight_prune"]}.get(file, [file])
    with contextlib.redirect_stdout(None):
        return all(run(op) for op in ops)


def main(module: Path) -> None:
    torch.manual_seed(0)
    emulated_cuda.install(emulated_cuda.load(module), pytest.MonkeyPatch())
    print("all:", in_a_child(run), flush=True)
    for source in sorted((module.parent / "cuda").iterdir()):
        for number, line in enumerate(source.read_text().splitlines(), 1):
            if re.search(r"__sync(threads|warp)\(\)", line):
                place = f"{source.name}:{number}"
                print(f"without {place}:", in_a_child(lambda place=place: without(place)), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
