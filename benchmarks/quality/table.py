"""Write the tables of README.md from the results of the study; a test compares the two.

python -m benchmarks.quality.table            # into README.md
python -m benchmarks.quality.table --check    # exit code 1 if README.md says something else
"""

from __future__ import annotations

import re
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.quality.analysis import (
    Records,
    Results,
    averages,
    chosen,
    comparable,
    conditions,
    differences,
    load,
    merged,
    standard_error,
)
from benchmarks.quality.records import Record
from benchmarks.quality.study import (
    CHOICE_SUITES,
    HELD_OUT_SEEDS,
    READING_SUITES,
    SUITES,
    TABLE,
    Options,
    candidates,
    distinct,
    label,
    mean,
    preset,
    readings,
    rtsvm_defaults,
)

README = Path(__file__).resolve().parent / "README.md"
PART = re.compile(r"(<!-- results -->\n).*(\n<!-- end of results -->)", re.DOTALL)

METHODS = [method for method, _, _ in TABLE]
SETTINGS = ("default", "tuned")
COLUMNS: tuple[tuple[str, Callable[[Sequence[float]], float], int], ...] = (
    ("accuracy", mean, 1), ("accuracy", min, 1), ("bits", mean, 2)
)  # fmt: skip

Entry = dict[str, list[float]]  # scores by measure, task by task
Variants = dict[str, str]  # of `rtsvm`: their names in tables, and their labels


def spread(values: Sequence[float], digits: int) -> str:
    return f"{mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def gain(values: Sequence[float], digits: int = 1) -> str:
    """Format a mean difference and its standard error."""
    return f"{mean(values):+.{digits}f} ± {standard_error(values):.{digits}f}"


def row(cells: Sequence[str]) -> str:
    return "|" + "".join(f" {cell} |" if cell else " |" for cell in cells)


def head(cells: Sequence[str]) -> list[str]:
    return [row(cells), "|---" * len(cells) + "|"]


def references() -> dict[str, Callable[[Record], Entry]]:
    """Return what the base and the experts score; of an expert, its own task counts."""

    def own(record: Record) -> Entry:
        return {measure: [expert[measure][task] for task, expert in enumerate(record["experts"])]
                for measure, _, _ in COLUMNS}  # fmt: skip

    return {"base": lambda record: record["base"], "experts, each on its task": own}


def merges(setting: str, variants: Variants) -> dict[str, Callable[[Record], Entry]]:
    """Return what all merges score."""
    names = {f"`{method}`": method for method in METHODS} | variants
    return {name: lambda record, key=key: (record["methods"] | record["rtsvm"])[key][setting]
            for name, key in names.items()}  # fmt: skip


def suite_table(records: Sequence[Record], variants: Variants) -> list[str]:
    """Scores of all models of one suite."""

    def cells(entry: Callable[[Record], Entry]) -> list[str]:
        return [spread([pick(entry(record)[measure]) for record in records], digits)
                for measure, pick, digits in COLUMNS]  # fmt: skip

    default, tuned = (merges(setting, variants) for setting in SETTINGS)
    return [
        *head(["", "mean", "worst task", "bits", "tuned: mean", "worst task", "bits"]),
        *(row([name, *cells(entry), "", "", ""]) for name, entry in references().items()),
        *(row([name, *cells(default[name]), *cells(tuned[name])]) for name in default),
    ]


def overview(results: Results, variants: Variants) -> list[str]:
    """Mean accuracy of all models in all suites, at the default and tuned."""

    def cells(entry: Callable[[Record], Entry]) -> list[str]:
        means = [
            mean([mean(entry(record)["accuracy"]) for record in groups["held_out"]]) for groups in results.values()
        ]
        return [f"{value:.1f}" for value in (*means, mean(means))]

    default, tuned = (merges(setting, variants) for setting in SETTINGS)
    return [
        *head(["", *results, "mean"]),
        *(row([name, *cells(entry)]) for name, entry in references().items()),
        *(
            row([name, *map(" / ".join, zip(cells(default[name]), cells(tuned[name]), strict=True))])
            for name in default
        ),
    ]


def best_of(setting: str, records: Sequence[Record]) -> str:
    """Name the best method but `tsvm` and `rtsvm` by test accuracy, which is in its favour."""
    others = [method for method in METHODS if method != "tsvm"]
    return max(others, key=lambda method: mean([merged(method, setting, "accuracy")(record) for record in records]))


def verdict(results: Results, name: str, key: str) -> list[str]:
    """Differences of a variant of `rtsvm` from others on the held-out seeds, suite by suite."""
    held_out = {suite: groups["held_out"] for suite, groups in results.items()}
    whole = [record for records in held_out.values() for record in records]
    # Its own setting, the rival's, and the rival.
    columns = [(ours, theirs, rival) for rival in ("tsvm", "") for ours, theirs in
               (("default", "default"), ("default", "tuned"), ("tuned", "tuned"))]  # fmt: skip
    titles = [f"{'tuned' if ours == 'tuned' else 'default'} above {f'`{rival}`' if rival else 'the best other'}"
              f"{', tuned' if theirs == 'tuned' else ''}" for ours, theirs, rival in columns]  # fmt: skip
    cells: dict[str, list[str]] = {suite: [] for suite in (*held_out, "mean of the suites")}
    for ours, theirs, rival in columns:

        def above(other: str, records: Sequence[Record], ours: str = ours, theirs: str = theirs) -> list[float]:
            return differences(merged(key, ours, "accuracy"), merged(other, theirs, "accuracy"), records)

        for suite, records in held_out.items():
            other = rival or best_of(theirs, records)
            cells[suite].append(gain(above(other, records)) + ("" if rival else f" `{other}`"))
        other = rival or best_of(theirs, whole)
        average = averages(above(other, records) for records in held_out.values())
        cells["mean of the suites"].append(gain(average, 2) + ("" if rival else f" `{other}`"))
    return [f"Points of {name}:", "", *head(["", *titles]), *(row([suite, *found]) for suite, found in cells.items())]


def compared(results: Results, suites: Sequence[str], tried: Sequence[Options], settings: Sequence[str]) -> list[str]:
    """Validation accuracy of variants of `rtsvm` on the choice seeds, as the difference from that of `tsvm`."""
    default = label(rtsvm_defaults())
    titles = [f"{'tuned: ' if setting == 'tuned' and column == 0 else ''}{title}"
              for setting in settings for column, title in enumerate((*suites, "mean"))]  # fmt: skip
    lines = head(["options of `rtsvm`", *titles])
    for options in distinct(tried):
        cells, key = [], label(options)
        for setting in settings:
            pair = merged(key, setting, "validation"), merged("tsvm", setting, "validation")
            means = [mean(differences(*pair, results[suite]["choice"])) for suite in suites]
            cells += [*(f"{value:+.1f}" for value in means), f"{mean(means):+.2f}"]
        lines.append(row([f"**{key}** (default)" if key == default else key, *cells]))
    return lines


def judgement(results: Results, candidate: Options | None) -> list[str]:
    """The choice, and whether the rule accepts it."""
    if candidate is None:
        return ["The candidates have not been measured in all choice suites yet."]
    lines = [f"Best of {len(candidates())} candidates by validation accuracy at alpha 1: **{label(candidate)}**."]
    if set(results) != set(SUITES) or any(len(groups["held_out"]) < len(HELD_OUT_SEEDS) for groups in results.values()):
        return [*lines, "It has not been judged in all suites yet."]
    found = conditions(results, label(candidate))
    outcome = "makes it the default" if all(met for _, met in found) else "offers it as a preset; the defaults stay"
    return [*lines, "", *(f"- {words}: **{'met' if met else 'missed'}**" for words, met in found), "",
            f"The rule {outcome}."]  # fmt: skip


def text(records: Records) -> str:
    """Return the generated part of README.md."""
    results, candidate, default = comparable(records), chosen(records), label(rtsvm_defaults())
    if not results:
        return "There are no results: run `python -m benchmarks.quality.run`."
    named = {default: "`rtsvm`", label(preset()): "`rtsvm`, `preset: weighted`"}
    if candidate is not None:
        named = {label(candidate): f"`rtsvm`, {label(candidate)}"} | named
    held_out = [record for groups in results.values() for record in groups["held_out"]]
    variants = {name: key for key, name in named.items() if all(key in record["rtsvm"] for record in held_out)}
    missing = [f"`{suite}`" for suite in SUITES if suite not in results]
    count = len(next(iter(results.values()))["held_out"])

    lines = [f"No results yet: {', '.join(missing)}. Means are over the other suites.", ""] if missing else []
    lines += ["### The choice of defaults", "", *judgement(results, candidate), ""]
    if candidate is not None:
        lines += ["Points of the candidates above `tsvm` (choice seeds, validation data, alpha 1):", ""]
        lines += [*compared(results, CHOICE_SUITES, candidates(), ["default"]), ""]
    lines += [f"### The verdict ({count} held-out seeds, test data)", ""]
    for name, key in variants.items():
        lines += [*verdict(results, name, key), ""]
    lines += ["### All suites (held-out seeds, test data): mean accuracy, default / tuned", ""]
    lines += [*overview(results, variants), ""]
    for suite, groups in results.items():
        title = f"### {suite.capitalize()} (held-out seeds, test data)"
        lines += [title, "", *suite_table(groups["held_out"], variants), ""]
    lines += ["### Readings of the paper: points above `tsvm` (choice seeds, validation data)", ""]
    suites = [suite for suite in READING_SUITES if suite in results]
    measured = [
        options
        for options in readings()
        if all(label(options) in record["rtsvm"] for suite in suites for record in results[suite]["choice"])
    ]
    if len(measured) < len(readings()):
        lines += [f"{len(readings()) - len(measured)} more have no results yet.", ""]
    return "\n".join([*lines, *compared(results, suites, measured, SETTINGS)])


def write() -> None:
    README.write_text(PART.sub(lambda match: match[1] + text(load()) + match[2], README.read_text()))


def main() -> None:
    if "--check" not in sys.argv[1:]:
        write()
    elif text(load()) not in README.read_text():
        sys.exit("benchmarks/quality/README.md is not that of the results: run python -m benchmarks.quality.table")


if __name__ == "__main__":
    main()
