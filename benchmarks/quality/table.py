"""Write the tables of README.md from the results of the study; a test compares the two.

python -m benchmarks.quality.table            # into README.md
python -m benchmarks.quality.table --check    # exit code 1 if README.md says something else
"""

from __future__ import annotations

import math
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.quality.records import Record, records_of
from benchmarks.quality.study import START, TABLE, label, mean, rtsvm_defaults
from r_tsvm_kernels.bench import read_rows

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "results" / "quality"
README = HERE / "README.md"
SUITES = ("digits", "language", "tables")
PART = re.compile(r"(<!-- results -->\n).*(\n<!-- end of results -->)", re.DOTALL)

GROUPS = ("choice", "held_out")
GOAL = 1.0  # points above `tsvm`

Seed = Record
Results = dict[str, dict[str, list[Seed]]]  # by suite and group
Value = Callable[[Seed], float]


def load(results: Path = RESULTS) -> Results:
    """Return for each suite the records of the choice seeds and of the held-out seeds that every suite has."""
    files = [results / f"{suite}.json" for suite in SUITES]
    rows = [read_rows(path) if path.exists() else [] for path in files]
    data = [records_of(found) for found in rows]
    settings = rows[0][0]["notes"] if rows[0] else {}
    default = label(rtsvm_defaults())
    groups = {}
    for group in GROUPS:
        groups[group] = [str(seed) for seed in settings.get(f"{group}_seeds", [])
                         if all(default in found.get(str(seed), {}).get("rtsvm", {}) for found in data)]  # fmt: skip
    return {
        suite: {group: [records[seed] for seed in seeds] for group, seeds in groups.items()}
        for suite, records in zip(SUITES, data, strict=True)
    }


def complete(results: Results) -> bool:
    """Whether there are seeds enough for a mean and a spread."""
    return all(len(seeds) > 1 for groups in results.values() for seeds in groups.values())


def merged(name: str, setting: str, measure: str, pick: Callable[[Sequence[float]], float] = mean) -> Value:
    """A value of a method, or of the variant of `rtsvm` of that label."""

    def value(seed: Seed) -> float:
        entry = seed["methods"][name] if name in seed["methods"] else seed["rtsvm"][name]
        return pick(entry[setting][measure])

    return value


def spread(values: Sequence[float], digits: int = 1) -> str:
    return f"{mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def difference(first: Value, second: Value, seeds: Sequence[Seed]) -> list[float]:
    return [first(seed) - second(seed) for seed in seeds]


def pooled(by_suite: Sequence[Sequence[float]]) -> list[float]:
    return [value for values in by_suite for value in values]


def signed(values: Sequence[float]) -> str:
    return f"{mean(values):+.1f} ± {statistics.stdev(values):.1f}"


def suite_table(seeds: Sequence[Seed], default: str) -> list[str]:
    lines = ["| | mean | worst task | tuned: mean | worst task | bits |", "|---|---|---|---|---|---|"]
    own = [[expert["accuracy"][task] for task, expert in enumerate(seed["experts"])] for seed in seeds]
    bits = [mean([expert["bits"][task] for task, expert in enumerate(seed["experts"])]) for seed in seeds]
    base = [seed["base"]["accuracy"] for seed in seeds]
    for name, scores, cross_entropy in (
        ("base", base, [mean(seed["base"]["bits"]) for seed in seeds]), ("experts, each on its task", own, bits)
    ):  # fmt: skip
        means, worst = spread([mean(values) for values in scores]), spread([min(values) for values in scores])
        lines.append(f"| {name} | {means} | {worst} | | | {spread(cross_entropy, 2)} |")
    for name, key in [(f"`{method}`", method) for method, _, _ in TABLE] + [("`rtsvm`", default)]:
        cells = [spread([merged(key, setting, "accuracy", pick)(seed) for seed in seeds])
                 for setting in ("default", "tuned") for pick in (mean, min)]  # fmt: skip
        cells.append(spread([merged(key, "tuned", "bits")(seed) for seed in seeds], 2))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def best_of(methods: Sequence[str], setting: str, seeds: Sequence[Seed]) -> str:
    return max(methods, key=lambda method: mean([merged(method, setting, "accuracy")(seed) for seed in seeds]))


def gains(results: Results, default: str, rivals: Sequence[str], setting: str) -> list[list[float]]:
    """Return by how much `rtsvm` is above one rival per suite, seed by seed: for each suite, then for their mean."""
    ours = merged(default, setting, "accuracy")
    by_suite = [
        difference(ours, merged(rival, setting, "accuracy"), results[suite]["held_out"])
        for suite, rival in zip(SUITES, rivals, strict=True)
    ]
    return [*by_suite, [mean(values) for values in zip(*by_suite, strict=True)]]


def rivals(results: Results, setting: str) -> dict[str, list[str]]:
    """Name whom `rtsvm` is compared with: a label, and one method per suite."""
    others = [method for method, _, _ in TABLE if method != "tsvm"]
    best = [best_of(others, setting, results[suite]["held_out"]) for suite in SUITES]
    whole = best_of(others, setting, [seed for suite in SUITES for seed in results[suite]["held_out"]])
    return {
        "`tsvm`": ["tsvm"] * len(SUITES),
        f"`{whole}`, the best other method on the whole": [whole] * len(SUITES),
        f"{', '.join(f'`{name}`' for name in best)}, the best other method of each suite": best,
    }


def verdict(results: Results, default: str) -> list[str]:
    """Differences on the held-out seeds, in words and as a table."""
    words, lines = (
        [],
        [f"| points above | {' | '.join(SUITES)} | mean of the suites | won |", "|---|---|---|---|---|---|"],
    )
    for setting in ("default", "tuned"):
        for name, methods in rivals(results, setting).items():
            *by_suite, average = gains(results, default, methods, setting)
            won = sum(value > 0 for value in pooled(by_suite))
            cells = [signed(values) for values in (*by_suite, average)]
            lines.append(f"| {name}, {setting} | {' | '.join(cells)} | {won} of {len(pooled(by_suite))} |")
            if len(set(methods)) == 1:
                error = statistics.stdev(average) / math.sqrt(len(average))
                words.append(f"- {name}, {setting}: **{mean(average):+.2f}** points (standard error {error:.2f})" + (
                    f"; the goal of {GOAL:g} point is {'met' if mean(average) >= GOAL else 'missed'}."
                    if methods[0] == "tsvm" else "."
                ))  # fmt: skip
    count = len(results[SUITES[0]]["held_out"])
    return [f"The defaults of `rtsvm` (**{default}**) over {count} held-out seeds, on the mean of the suites, against",
            "", *words, "", *lines]  # fmt: skip


def ablation(results: Results, default: str) -> list[str]:
    """Validation accuracy on the choice seeds, as the difference from TSVM's."""
    head = f"{' | '.join(SUITES)} | mean"
    lines = [f"| variant of `rtsvm` | {head} | tuned: {head} |", "|---" * 9 + "|"]
    for variant in results[SUITES[0]]["choice"][0]["rtsvm"]:
        cells = []
        for setting in ("default", "tuned"):
            gains = [
                difference(merged(variant, setting, "validation"), merged("tsvm", setting, "validation"),
                           results[suite]["choice"])
                for suite in SUITES
            ]  # fmt: skip
            cells += [f"{mean(values):+.1f}" for values in gains]
            cells.append(f"{mean([mean(values) for values in gains]):+.2f}")
        name = f"**{variant}** (default)" if variant == default else variant
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def choice(results: Results, current: str) -> list[str]:
    """Apply the rule of README.md to the choice seeds."""
    variants = list(results[SUITES[0]]["choice"][0]["rtsvm"])

    def above(variant: str, setting: str) -> list[list[float]]:
        pair = merged(variant, setting, "validation"), merged(current, setting, "validation")
        return [difference(*pair, results[suite]["choice"]) for suite in SUITES]

    best = max(variants, key=lambda variant: mean(pooled(above(variant, "default"))))
    by_suite, tuned = above(best, "default"), above(best, "tuned")
    together = pooled(by_suite)
    error = statistics.stdev(together) / math.sqrt(len(together))
    accepted = (
        best != current
        and mean(together) > 2 * error
        and all(mean(values) > 0 for values in by_suite)
        and mean(pooled(tuned)) > 0
    )
    parts = ", ".join(f"{suite} {signed(values)}" for suite, values in zip(SUITES, by_suite, strict=True))
    return [
        f"Best of {len(variants)} variants by validation accuracy at alpha 1: **{best}**. Points above **{current}**: "
        f"{parts}; together {mean(together):+.2f}, standard error {error:.2f}; with alpha tuned "
        f"{mean(pooled(tuned)):+.2f}. The rule {'chooses it' if accepted else 'leaves the defaults as they are'}."
    ]


def text() -> str:
    """Return the generated part of README.md."""
    results, default = load(), label(rtsvm_defaults())
    if not complete(results):
        return "The results are not complete: run `python -m benchmarks.quality.run`."
    lines = ["### The choice of defaults (choice seeds, validation data)", "", *choice(results, label(START)), ""]
    lines += ["### The verdict (held-out seeds, test data)", "", *verdict(results, default), ""]
    for suite in SUITES:
        seeds = results[suite]["held_out"]
        lines += [f"### {suite.capitalize()} (held-out seeds, test data)", "", *suite_table(seeds, default), ""]
    lines += ["### Ablation: points above `tsvm` (choice seeds, validation data)", "", *ablation(results, default)]
    return "\n".join(lines)


def write() -> None:
    README.write_text(PART.sub(lambda match: match[1] + text() + match[2], README.read_text()))


def main() -> None:
    if "--check" not in sys.argv[1:]:
        write()
    elif text() not in README.read_text():
        sys.exit("benchmarks/quality/README.md is not that of the results: run python -m benchmarks.quality.table")


if __name__ == "__main__":
    main()
