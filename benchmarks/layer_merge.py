"""Merge the matrices of one layer of Mistral-7B on a GPU: by both solvers, and as published; time and error.

    python benchmarks/layer_merge.py [--out DIR] [--dry-run]

Three fine-tunes in bfloat16. TSV-Merge at k = r // T, and R-TSVM at density 0.3 with the rank that follows from it;
solved by `eigen` and by `products`, against T + 2 full float32 SVDs (`float32 SVD`), the published way written down by
us. Each result is compared with float64 on the same device before it is timed; what takes more than five seconds is
timed once. Writes `layer.json`, the smallest matrices first, after each matrix; at the end the seconds of the whole
layer by solver. With --dry-run tiny matrices on the CPU; such figures mean nothing.
"""

from __future__ import annotations

import json

from gpu import MISTRAL_LAYER, TASKS, Suite, suite_of

from r_tsvm_kernels.bench import PLANS, Plan, chosen, run_suite

METHODS = ("tsvm", "rtsvm: density 0.3")
ORDER = ("k_proj", "q_proj", "down_proj", "gate_proj")


def layer_seconds(suite: Suite) -> dict[str, float]:
    """Return the seconds of all seven matrices by method and solver, where each of them was right."""
    seconds: dict[str, list[float]] = {}
    for row in suite.result["rows"]:
        if row["status"] == "timed":
            times = MISTRAL_LAYER.get(row["matrix"].rpartition(" ")[2], 1)
            seconds.setdefault(f"{row['name']} by {row['provider']}", []).append(times * row["seconds"]["median"])
    matrices = len({row["matrix"] for row in suite.result["rows"]})
    return {name: sum(values) for name, values in seconds.items() if len(values) == matrices}


def main() -> None:
    suite = suite_of("layer.json", "Merge one layer of Mistral-7B.")
    labels = tuple(f"Mistral-7B {name}" for name in ORDER)
    plan = PLANS["dry-run"] if suite.dry else Plan("layer", {"spectral": labels}, ("bfloat16",), 10.0, TASKS)

    def keep(report: dict[str, object]) -> None:
        suite.result |= report | {"device": suite.device.type}
        suite.save()

    run_suite(chosen(METHODS), plan, suite.device, keep, lambda what: print(what, flush=True))
    suite.result["layer_seconds"] = layer_seconds(suite)
    suite.save()
    print(json.dumps(suite.result["layer_seconds"], indent=1))


if __name__ == "__main__":
    main()
