"""Judge random calls of the spectral functions for a while: `make fuzz MINUTES=10`."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).parent)]

from inputs import problem
from judge import Verdict, judged


def one(seed: int) -> Verdict:
    """Judge the call of that seed."""
    rng = np.random.default_rng(seed)
    return judged(rng, problem(rng))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stride", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    start, seed = time.time(), options.seed
    outcomes, worst, shown = Counter(), {}, 0
    while time.time() < start + 60 * options.minutes:
        found = one(seed)
        outcomes[found.name, found.outcome] += 1
        if found.outcome in ("dishonest", "refused"):
            print(seed, found, flush=True)
        key = found.name, found.route
        if found.outcome == "judged" and found.ratio > worst.get(key, (0,))[0]:
            worst[key] = (found.ratio, found.error, seed)
        seed += options.stride
    for key, count in sorted(outcomes.items()):
        print(*key, count)
    for key, value in sorted(worst.items()):
        print(*key, *(f"{v:.2g}" if isinstance(v, float) else v for v in value))
