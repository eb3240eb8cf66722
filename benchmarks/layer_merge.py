"""Merge matrices of one layer of Mistral-7B on a GPU: by both solvers, and as published; time and error.

    python -m benchmarks.layer_merge [--out DIR] [--dry-run]

Three fine-tunes in bfloat16. TSV-Merge at k = r // T, solved by `eigen` and by `products`, against T + 2 full float32
SVDs (`float32 SVD`), our implementation of the published way; each once. Each result is compared with float64 on the
same device before it is timed. Writes `layer.json`, the smallest matrices first; at the end the seconds of all seven
matrices of the layer by solver, if v takes as long as k, o as q, and up and down as gate. With `--dry-run` tiny
matrices on the CPU; such figures mean nothing.
"""

from __future__ import annotations

import sys
from dataclasses import replace

from benchmarks.gpu import TASKS, arguments_of, suite_of
from r_tsvm_kernels.bench import DECAYING, PLANS, Plan, Row, chosen, row, run_suite

# How many of the seven matrices take as long.
AS_LONG = {"k_proj": 2, "q_proj": 2, "gate_proj": 3}
MATRICES = ("k_proj", "q_proj", f"q_proj{DECAYING}", "gate_proj")


def layer_seconds(rows: list[Row]) -> list[Row]:
    """Return the time of all seven matrices by method and provider, where each of them was right."""
    seconds: dict[tuple[str, str, str], list[float]] = {}
    for found in rows:
        if found["metric"] == "time" and found["median"] is not None:
            label = found["options"]["matrix"]
            if not label.endswith(DECAYING):
                key = found["name"], found["provider"], found["role"]
                seconds.setdefault(key, []).append(AS_LONG.get(label.rpartition(" ")[2], 1) * found["median"])
    labels = {found["options"]["matrix"] for found in rows if "matrix" in found["options"]}
    matrices = sum(not label.endswith(DECAYING) for label in labels)
    return [
        row(name, provider, "time", sum(values), role=role, options={"matrix": "one layer", "tasks": TASKS})
        for (name, provider, role), values in seconds.items()
        if len(values) == matrices
    ]


def main() -> None:
    suite, _ = suite_of("layer.json", arguments_of(__doc__))
    labels = tuple(f"Mistral-7B {name}" for name in MATRICES)
    plan = Plan("layer", {"spectral": labels}, ("bfloat16",), 1.0, TASKS, rounds=1)
    if suite.dry:
        plan = replace(PLANS["dry-run"], matrices={"spectral": ("tiny", f"tiny{DECAYING}")})
    run_suite(chosen(["tsvm"]), plan, suite.device, suite.results, lambda what: print(what, flush=True))
    suite.add(layer_seconds(suite.results.rows))


if __name__ == "__main__":
    sys.exit(main())
