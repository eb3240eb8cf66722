"""Suggest the dispatch table from a run of `rtsvm bench --json`: the fastest backend of each op first.

    rtsvm bench --device cuda --full --json bench.json
    python benchmarks/dispatch_order.py bench.json dispatch_order.json

Backends are ordered by the geometric mean of their times over all inputs, each relative to the reference. One that was
wrong or failed on any input is left out; ops that were not measured keep their row. What is printed can go into
`r_tsvm_kernels/dispatch.py`; `with_order.py` tries it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from r_tsvm_kernels.bench import read_report
from r_tsvm_kernels.dispatch import ops

BACKEND = {"reference": "torch"}


def relative_times(rows: list[dict[str, Any]], op: str) -> dict[str, float]:
    """Return by backend the mean time relative to the reference's; without those that were wrong once."""
    of_op = [row for row in rows if row["name"].partition(":")[0] == op]
    bad = {row["provider"] for row in of_op if row["status"] in ("wrong", "failed")}
    times: dict[str, list[float]] = {}
    for row in of_op:
        if row["status"] == "timed" and row["role"] in ("ours", "reference") and "speedup" in row:
            times.setdefault(row["provider"], []).append(1 / row["speedup"]["median"])
    return {
        BACKEND.get(provider, provider): geometric_mean(values)
        for provider, values in times.items()
        if provider not in bad
    }


def suggest(report: dict[str, Any]) -> dict[str, Any]:
    """Return the suggested order by op, and the relative times behind it."""
    device = report["device"]
    order, times = {}, {}
    for op, devices in ((name, found.order) for name, found in ops().items()):
        times[op] = relative_times(report["rows"], op)
        known = [name for name in devices[device] if name in times[op]]
        # The reference is always there and always right: what is slower than it is never taken.
        order[op] = sorted(known, key=lambda name, op=op: times[op][name]) or list(devices[device])
        if "torch" not in order[op]:
            order[op].append("torch")
    return {"device": device, "order": order, "time_by_reference": times}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("report", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    report = read_report(args.report)
    suggested = suggest(report) | {name: report[name] for name in ("gpu", "cpu", "commit", "suite", "complete")}
    args.out.write_text(json.dumps(suggested, indent=1) + "\n")
    for op, order in suggested["order"].items():
        factors = ", ".join(f"{name} {1 / time:.1f} x" for name, time in suggested["time_by_reference"][op].items())
        print(f'    "{op}": {{"{suggested["device"]}": {tuple(order)!r}}},  # {factors}')


if __name__ == "__main__":
    main()
