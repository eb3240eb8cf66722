"""Judge certificates: random calls of the spectral functions against numpy in float64, for some minutes.

    make fuzz MINUTES=10
    python -m benchmarks.honesty [--minutes 10] [--processes 2] [--seed 0] [--json FILE]

A call is dishonest if its true error exceeds twice the error that its certificate states, or exceeds the tolerance
although the certificate says that it is met. Where the certificate reports an arbitrary choice among equal singular
values, the choice must be valid and the result right for it; in `iso_cts`, `star` and `core_space` the choice cannot be
seen from outside. The report is needless if changes of the last bits of the input make no difference. Inputs:
`tests/honesty/inputs.py`; a seed is one call. Exit code 1 if any call was dishonest.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import torch

from benchmarks.program import finish
from r_tsvm_kernels.bench import Results, Row, row
from tests.honesty.inputs import problem
from tests.honesty.judge import Verdict, judged

OUTCOMES = ("judged", "arbitrary", "refused", "dishonest")


def one(seed: int) -> Verdict:
    """Judge the call of that seed."""
    rng = np.random.default_rng(seed)
    try:
        return judged(rng, problem(rng))
    except Exception as error:
        error.add_note(f"seed {seed}")
        raise


def run(seed: int, stride: int, until: float) -> tuple[int, list[tuple[int, Verdict]]]:
    """Judge every `stride`-th seed until a time; return the next seed and the verdicts."""
    torch.set_num_threads(1)
    verdicts = []
    while time.time() < until:
        verdicts.append((seed, one(seed)))
        seed += stride
    return seed, verdicts


def summary(verdicts: list[tuple[int, Verdict]]) -> list[Row]:
    """Count the verdicts by function; the worst call of each has its route and seed in the notes."""
    rows = []
    for name in sorted({verdict.name for _, verdict in verdicts}):
        own = [(seed, verdict) for seed, verdict in verdicts if verdict.name == name]
        outcomes = Counter(verdict.outcome for _, verdict in own)
        counts = {"calls": len(own), **{outcome: outcomes[outcome] for outcome in OUTCOMES}}
        counts["needless"] = sum(verdict.needless for _, verdict in own)
        seed, worst = max(own, key=lambda pair: pair[1].ratio)
        rows += [row(name, "certificate", metric, count, unit="calls") for metric, count in counts.items()]
        rows.append(row(name, "certificate", "true / stated error", worst.ratio, unit="ratio",
                        notes={"route": worst.route, "seed": seed}))  # fmt: skip
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10, help="how long (10)")
    parser.add_argument("--processes", type=int, default=2, help="how many at a time (2)")
    parser.add_argument("--seed", type=int, default=0, help="the first one (0)")
    parser.add_argument("--json", metavar="FILE", help="write the counts to this file")
    options = parser.parse_args()
    until, verdicts, seeds = time.time() + 60 * options.minutes, [], list(range(options.processes))
    with ProcessPoolExecutor(options.processes) as pool:
        seeds = [options.seed + index for index in seeds]
        while time.time() < until:  # in parts of a minute, to report findings soon
            part = min(until, time.time() + 60)
            found = list(pool.map(run, seeds, [options.processes] * options.processes, [part] * options.processes))
            seeds = [seed for seed, _ in found]
            new = [pair for _, pairs in found for pair in pairs]
            for seed, verdict in new:
                if verdict.outcome in ("dishonest", "refused"):
                    print(f"seed {seed}: {verdict}", flush=True)
            verdicts += new
            dishonest = sum(verdict.outcome == "dishonest" for _, verdict in verdicts)
            print(f"{len(verdicts)} calls, {dishonest} dishonest", flush=True)
    results = Results(options.json, ("numpy",), replace=True)
    results.add(summary(verdicts))
    finish(results)
    return 1 if any(verdict.outcome == "dishonest" for _, verdict in verdicts) else 0


if __name__ == "__main__":
    sys.exit(main())
