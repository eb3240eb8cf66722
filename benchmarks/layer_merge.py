"""Merge the matrices of one layer of Mistral-7B on a GPU: by both solvers, and as published; time and error.

    python -m benchmarks.layer_merge [--out DIR] [--dry-run]

Three fine-tunes in bfloat16. TSV-Merge at k = r // T, and R-TSVM at density 0.3 with the rank that follows from it;
solved by `eigen` and by `products`, against T + 2 full float32 SVDs (`float32 SVD`), our implementation of the
published way. Each result is compared with float64 on the same device before it is timed. Writes `layer.json`, the
smallest matrices first; at the end the seconds of all seven matrices of the layer by solver. With `--dry-run` tiny
matrices on the CPU; such figures mean nothing.
"""

from __future__ import annotations

import sys

from benchmarks.gpu import MISTRAL_LAYER, TASKS, arguments_of, suite_of
from r_tsvm_kernels.bench import PLANS, Plan, Row, chosen, row, run_suite

METHODS = ("tsvm", "rtsvm: density 0.3")
ORDER = ("k_proj", "q_proj", "down_proj", "gate_proj")


def layer_seconds(rows: list[Row]) -> list[Row]:
    """Return the time of all seven matrices by method and provider, where each of them was right."""
    seconds: dict[tuple[str, str, str], list[float]] = {}
    for found in rows:
        if found["metric"] == "time" and found["median"] is not None:
            times = MISTRAL_LAYER.get(found["options"]["matrix"].rpartition(" ")[2], 1)
            key = found["name"], found["provider"], found["role"]
            seconds.setdefault(key, []).append(times * found["median"])
    matrices = len({found["options"]["matrix"] for found in rows if "matrix" in found["options"]})
    return [
        row(name, provider, "time", sum(values), role=role, options={"matrix": "one layer", "tasks": TASKS})
        for (name, provider, role), values in seconds.items()
        if len(values) == matrices
    ]


def main() -> None:
    suite, _ = suite_of("layer.json", arguments_of(__doc__))
    labels = tuple(f"Mistral-7B {name}" for name in ORDER)
    plan = PLANS["dry-run"] if suite.dry else Plan("layer", {"spectral": labels}, ("bfloat16",), 10.0, TASKS)
    run_suite(chosen(METHODS), plan, suite.device, suite.results, lambda what: print(what, flush=True))
    suite.add(layer_seconds(suite.results.rows))


if __name__ == "__main__":
    sys.exit(main())
