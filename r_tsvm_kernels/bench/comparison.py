"""Compare the report of a run with an earlier one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from ..errors import ConfigError
from ..files import read_regular
from .suite import SCHEMA

_MOST_BYTES = 1 << 28  # of a file of results
NOISE = 0.05  # relative; smaller changes are not told, whatever the quartiles say

Key = tuple[str, str, str, int, str]


class Change(NamedTuple):
    """A row in both reports.

    Attributes:
        key: benchmark, matrix, dtype, tasks, provider.
        before: median seconds.
        after: median seconds.
        ratio: after by before.
        verdict: ``faster`` or ``slower``, beyond noise; otherwise empty.
    """

    key: Key
    before: float
    after: float
    ratio: float
    verdict: str


def read_report(path: str | Path) -> dict[str, Any]:
    """Read the JSON of an earlier run.

    Raises:
        ConfigError: there is none, or it is not one of ours.
    """
    try:
        report: dict[str, Any] = json.loads(read_regular(path, _MOST_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: expected results that `rtsvm bench --json` wrote: {error}") from error
    if not isinstance(report, dict) or report.get("schema") != SCHEMA or "rows" not in report:
        raise ConfigError(f"{path}: expected results that `rtsvm bench --json` wrote, of schema {SCHEMA}")
    return report


def compare(before: dict[str, Any], after: dict[str, Any]) -> list[Change]:
    """Return the rows that were timed in both; a row has changed if its spreads do not overlap."""
    old, new = _timed_rows(before), _timed_rows(after)
    changes = []
    for key in (key for key in new if key in old):
        was, now = old[key]["seconds"], new[key]["seconds"]
        ratio = now["median"] / was["median"]
        several = min(was["rounds"], now["rounds"]) > 1
        verdict = ""
        if several and now["q1"] > was["q3"] and ratio > 1 + NOISE:
            verdict = "slower"
        elif several and now["q3"] < was["q1"] and ratio < 1 - NOISE:
            verdict = "faster"
        changes.append(Change(key, was["median"], now["median"], ratio, verdict))
    return changes


def compare_turns(turns: list[tuple[dict[str, Any], dict[str, Any]]]) -> tuple[list[Change], float]:
    """Compare two versions that ran in turns.

    The rows of others, eager torch and peers, measure the noise: their code is the same on both sides. A row of ours
    has changed if all turns agree on the direction, and if it changed by more than 19 of 20 rows of others.

    Args:
        turns: pairs of reports, before and after, that were made one right after the other.

    Returns:
        Every row that is in all reports, others' without a verdict; and the noise: the relative change, 0.05 or more,
        from which on there is a verdict.
    """
    pairs = [(_timed_rows(before), _timed_rows(after)) for before, after in turns]
    found = {}
    for key in (key for key in pairs[0][1] if all(key in rows for pair in pairs for rows in pair)):
        found[key] = [[pair[side][key]["seconds"]["median"] for pair in pairs] for side in (0, 1)]
    turnwise = {key: [b / a for a, b in zip(was, now, strict=True)] for key, (was, now) in found.items()}
    ratios = {key: median(values) for key, values in turnwise.items()}
    ours = {key for key in found if pairs[0][1][key]["role"] == "ours"}
    others = sorted(max(ratio, 1 / ratio) - 1 for key, ratio in ratios.items() if key not in ours)
    noise = max(NOISE, others[math.ceil(0.95 * len(others)) - 1] if others else 0.0)
    changes = []
    for key, (was, now) in found.items():
        verdict = ""
        if key in ours and len(turns) > 1:
            if min(turnwise[key]) > 1 and ratios[key] > 1 + noise:
                verdict = "slower"
            elif max(turnwise[key]) < 1 and ratios[key] < 1 / (1 + noise):
                verdict = "faster"
        changes.append(Change(key, median(was), median(now), ratios[key], verdict))
    return changes, noise


def different_circumstances(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Return what was not the same in both runs, besides the code."""
    names = ("cpu", "gpu", "threads", "device", "suite")
    found = [f"{name}: {before.get(name)} -> {after.get(name)}" for name in names if before.get(name) != after[name]]
    torch_versions = [report.get("versions", {}).get("torch") for report in (before, after)]
    if torch_versions[0] != torch_versions[1]:
        found.append(f"torch: {torch_versions[0]} -> {torch_versions[1]}")
    return found


def _timed_rows(report: dict[str, Any]) -> dict[Key, dict[str, Any]]:
    return {
        (row["name"], row["matrix"], row["dtype"], row["tasks"], row["provider"]): row
        for row in report["rows"]
        if row["status"] == "timed"
    }
