"""Results of the study: loading them, comparing methods, and the rule that chooses the defaults of `rtsvm`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from benchmarks import ROOT
from benchmarks.quality.records import Record, records_of
from benchmarks.quality.study import (
    CHOICE_SEEDS,
    CHOICE_SUITES,
    HELD_OUT_SEEDS,
    SUITES,
    Options,
    candidates,
    label,
    mean,
    rtsvm_defaults,
)
from r_tsvm_kernels.bench import read_rows

RESULTS = ROOT / "benchmarks" / "results" / "quality"
GOAL = 1.5  # points above `tsvm` on the mean of the suites

Records = dict[str, dict[str, Record]]  # by suite, then by seed
Results = dict[str, dict[str, list[Record]]]  # by suite, then by group of seeds: "choice" or "held_out"
Value = Callable[[Record], float]


def load(results: Path = RESULTS) -> Records:
    """Return the records of all suites; those without results have none."""
    paths = {suite: results / f"{suite}.json" for suite in SUITES}
    return {suite: records_of(read_rows(path)) if path.exists() else {} for suite, path in paths.items()}


def comparable(records: Records) -> Results:
    """Return the suites with results, and of each group of seeds those that all these suites have.

    A suite counts if it has enough seeds for a spread. Those that are only judged have no choice seeds.
    """
    default = label(rtsvm_defaults())

    def done(suite: str, group: str, seed: int) -> bool:
        record = records[suite].get(str(seed), {})
        return bool(record) if group == "choice" else default in record.get("rtsvm", {})

    wanted = {"choice": CHOICE_SEEDS, "held_out": HELD_OUT_SEEDS}
    found = {
        suite: {
            group: {seed for seed in seeds if done(suite, group, seed)}
            for group, seeds in wanted.items()
            if group == "held_out" or suite in CHOICE_SUITES
        }
        for suite in SUITES
    }
    found = {suite: groups for suite, groups in found.items() if all(len(seeds) > 1 for seeds in groups.values())}
    shared = {
        group: [seed for seed in seeds if all(seed in groups.get(group, seeds) for groups in found.values())]
        for group, seeds in wanted.items()
    }
    return {
        suite: {group: [records[suite][str(seed)] for seed in shared[group]] for group in groups}
        for suite, groups in found.items()
    }


def merged(name: str, setting: str, measure: str, pick: Callable[[Sequence[float]], float] = mean) -> Value:
    """Return a function from a record to a score of a method, or of the variant of `rtsvm` of that label."""

    def value(record: Record) -> float:
        entry = record["methods"][name] if name in record["methods"] else record["rtsvm"][name]
        return pick(entry[setting][measure])

    return value


def differences(first: Value, second: Value, records: Sequence[Record]) -> list[float]:
    return [first(record) - second(record) for record in records]


def averages(by_suite: Iterable[Sequence[float]]) -> list[float]:
    """Return the mean of the suites, seed by seed."""
    return [mean(values) for values in zip(*by_suite, strict=True)]


def standard_error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values))


def chosen(records: Records) -> Options | None:
    """Return the best candidate on the choice seeds (validation data, alpha 1), or None while results are missing."""
    options = {label(candidate): candidate for candidate in candidates()}
    found = [records[suite].get(str(seed), {}) for suite in CHOICE_SUITES for seed in CHOICE_SEEDS]
    if not all(options.keys() <= record.get("rtsvm", {}).keys() for record in found):
        return None
    return options[max(options, key=lambda name: mean([merged(name, "default", "validation")(r) for r in found]))]


def conditions(results: Results, candidate: str) -> list[tuple[str, bool]]:
    """Return the conditions under which README.md makes a candidate the default, each with whether it is met."""

    def above(setting: str) -> dict[str, list[float]]:
        pair = merged(candidate, "default", "accuracy"), merged("tsvm", setting, "accuracy")
        return {suite: differences(*pair, groups["held_out"]) for suite, groups in results.items()}

    by_suite = above("default")
    gain, over_tuned = averages(by_suite.values()), averages(above("tuned").values())
    error = standard_error(gain)
    lower = [suite for suite, values in by_suite.items() if mean(values) < -standard_error(values)]
    return [
        (f"above `tsvm` by {GOAL:g} points, and three standard errors: {mean(gain):+.2f}, standard error {error:.2f}",
         mean(gain) >= GOAL and mean(gain) > 3 * error),
        (f"in no suite below `tsvm` by more than a standard error: {', '.join(lower) or 'none'}", not lower),
        (f"above `tsvm` with alpha tuned: {mean(over_tuned):+.2f}", mean(over_tuned) > 0),
    ]  # fmt: skip
