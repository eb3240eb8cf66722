"""Suggest the dispatch table from a run of `rtsvm bench --json`: the fastest backend of each op first.

    rtsvm bench --device cuda --full --json bench.json
    python -m benchmarks.dispatch_order bench.json dispatch_order.json

Backends are ordered by the geometric mean of their times over all inputs, each relative to the reference. One that was
wrong or failed on any input is left out; ops that were not measured keep their order. `rtsvm merge --backend OP=NAME`
tries a backend, `model_merge --order` all that are first.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from r_tsvm_kernels.bench import Row, read_rows
from r_tsvm_kernels.dispatch import ops


def relative_times(rows: list[Row], op: str) -> dict[str, float]:
    """Return by backend the mean time relative to the reference's; without those that were wrong once."""
    of_op = [row for row in rows if row["name"].partition(":")[0] == op]
    bad = {row["provider"] for row in of_op if row["notes"].get("status") in ("wrong", "failed")}
    times: dict[str, list[float]] = {}
    for row in of_op:
        if row["role"] == "ours" and row["metric"] == "speed-up" and row["notes"]["against"] == "reference":
            times.setdefault(row["provider"], []).append(1 / row["median"])
        elif row["role"] == "reference" and row["metric"] == "time" and row["median"] is not None:
            times.setdefault("torch", []).append(1.0)
    return {provider: geometric_mean(values) for provider, values in times.items() if provider not in bad}


def suggest(rows: list[Row]) -> dict[str, Any]:
    """Return the suggested order by op, and the relative times behind it."""
    device = next(row["options"]["device"] for row in rows if "device" in row["options"])
    order, times = {}, {}
    for op, devices in ((name, found.order) for name, found in ops().items()):
        times[op] = relative_times(rows, op)
        known = [name for name in devices[device] if name in times[op]]
        # The reference always exists and is always right, so backends slower than it are never used.
        order[op] = sorted(known, key=lambda name, op=op: times[op][name]) or list(devices[device])
        if "torch" not in order[op]:
            order[op].append("torch")
    return {"device": device, "order": order, "time_by_reference": times}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("report", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    suggested = suggest(read_rows(args.report))
    args.out.write_text(json.dumps(suggested, indent=1) + "\n")
    for op, order in suggested["order"].items():
        factors = ", ".join(f"{name} {1 / time:.1f} x" for name, time in suggested["time_by_reference"][op].items())
        print(f'    "{op}": {{"{suggested["device"]}": {tuple(order)!r}}},  # {factors}')


if __name__ == "__main__":
    main()
