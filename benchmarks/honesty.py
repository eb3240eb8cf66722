"""Judge certificates: random calls of the spectral functions against numpy in float64, for some minutes.

    make fuzz MINUTES=10
    python benchmarks/honesty.py [--minutes 10] [--processes 2] [--seed 0] [--json FILE]

A call is dishonest if its true error is above twice the error that its certificate states, or above the tolerance where
that is said to be met. Where the certificate admits to an arbitrary choice among equal singular values, the choice must
be a valid one and the result right for it, but for `iso_cts`, `star` and `core_space`, whose choices cannot be seen
from outside. Such a flag is needless if changes of the last bits of the input make no difference. Inputs:
`tests/honesty/inputs.py`; a seed is one call. Exit code 1 if any call was dishonest.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import ROOT, provenance

sys.path.insert(0, str(ROOT / "tests"))

from honesty.inputs import problem
from honesty.judge import Verdict, judged

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


def summary(verdicts: list[tuple[int, Verdict]]) -> dict[str, Any]:
    """Sum the verdicts up: by function, and in all."""
    rows = []
    for name in sorted({verdict.name for _, verdict in verdicts}):
        own = [(seed, verdict) for seed, verdict in verdicts if verdict.name == name]
        counts = Counter(verdict.outcome for _, verdict in own)
        seed, worst = max(own, key=lambda pair: pair[1].ratio)
        row = {"function": name, "calls": len(own), **{outcome: counts[outcome] for outcome in OUTCOMES}}
        row |= {"needless": sum(verdict.needless for _, verdict in own)}
        rows.append({**row, "worst_ratio": worst.ratio, "route": worst.route, "seed": seed})
    outcomes = Counter(verdict.outcome for _, verdict in verdicts)
    return {
        "calls": len(verdicts),
        "dishonest": outcomes["dishonest"],
        "outcomes": dict(outcomes),
        "needless": sum(verdict.needless for _, verdict in verdicts),
        "routes": dict(Counter(verdict.route for _, verdict in verdicts if verdict.route)),
        "worst_ratio": max(verdict.ratio for _, verdict in verdicts),
        "rows": rows,
    }


def sources() -> str:
    """Hash the sources that were judged, and the judges."""
    digest = hashlib.sha256()
    folders = ("r_tsvm_kernels/linalg", "r_tsvm_kernels/methods", "tests/honesty")
    for path in sorted(path for folder in folders for path in (ROOT / folder).glob("*.py")):
        digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10, help="how long (10)")
    parser.add_argument("--processes", type=int, default=2, help="how many at a time (2)")
    parser.add_argument("--seed", type=int, default=0, help="the first one (0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the summary to this file")
    options = parser.parse_args()
    until, verdicts, seeds = time.time() + 60 * options.minutes, [], list(range(options.processes))
    with ProcessPoolExecutor(options.processes) as pool:
        seeds = [options.seed + index for index in seeds]
        while time.time() < until:  # in parts of a minute, so that what is found is told soon
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
    result = summary(verdicts)
    for row in result["rows"]:
        shown = {key: f"{value:.3g}" if isinstance(value, float) else value for key, value in row.items()}
        print(", ".join(f"{key} {value}" for key, value in shown.items()))
    print({key: value for key, value in result.items() if key != "rows"})
    if options.json:
        options.json.write_text(json.dumps({**provenance("numpy"), "sources": sources(), **result}, indent=1) + "\n")
    return 1 if result["dishonest"] else 0


if __name__ == "__main__":
    sys.exit(main())
