"""Figures that README.md and the pages quote, each named by file, name, provider and metric."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from r_tsvm_kernels.bench import Row, read_rows
from r_tsvm_kernels.bench.table import MARK, Sheet, cell, error, markdown, older, sheets


class Figure(NamedTuple):
    """One figure and what is compared in it."""

    what: str  # may hold {name}, {shape} and {count} of the row that is found
    against: str
    file: str  # below benchmarks/results/cpu
    name: str | None  # None: any
    provider: str | None
    metric: str
    labels: dict[str, Any] = {}  # shape, or options of the row; a tuple: one of these  # noqa: RUF012
    other: str | None = None  # whom a speed-up is against; whose memory is shown beside
    pick: Literal["only", "worst", "best"] = "only"
    short: bool = False  # in the README, too


MERGE = "`rtsvm merge`, `task_arithmetic`, 3 checkpoints"
CACHED = ("cached", "cached, beside mergekit")  # the latter: measured apart from `cp`
HEADLINES = (
    Figure("clip, select, prune: {shape} bf16, T=3", "eager PyTorch", "bench.json", "reweight_prune", "cpu",
           "speed-up", short=True),
    Figure("the same", "a copy of as many bytes", "bench.json", "reweight_prune", "cpu", "share", short=True),
    Figure("`{name}`, {shape}: the slowest of {count} ops and methods", "eager PyTorch", "bench.json", None, None,
           "speed-up", pick="worst", short=True),
    Figure("`ties`, {shape} bf16, T=3", "mergekit's function", "bench_mergekit.json", "ties", "cpu", "speed-up",
           other="mergekit 0.1.5", short=True),
    Figure(f"{MERGE} of 1.0 GB, cached", "mergekit's command", "engine.json", "task_arithmetic", "rtsvm merge",
           "speed-up", {"checkpoint": "1.0 GB", "inputs": CACHED}, "mergekit-yaml", short=True),
    Figure("the same: peak memory", "mergekit's command", "engine.json", "task_arithmetic", "rtsvm merge", "memory",
           {"checkpoint": "1.0 GB", "inputs": CACHED}, "mergekit-yaml"),
    Figure(f"{MERGE} of 4.0 GB, from disk", "`cp` and fsync of as many bytes", "engine.json", "task_arithmetic",
           "rtsvm merge", "speed-up", {"checkpoint": "4.0 GB", "inputs": "from disk"}, "cp and fsync", short=True),
    Figure(f"{MERGE} of 1.0 GB, cached", "`cp` and fsync of as many bytes", "engine.json", "task_arithmetic",
           "rtsvm merge", "speed-up", {"checkpoint": "1.0 GB", "inputs": "cached"}, "cp and fsync"),
    Figure("the same, without starting Python and torch", "`cp` and fsync of as many bytes", "engine.json",
           "task_arithmetic", "rtsvm merge, started", "speed-up", {"checkpoint": "1.0 GB", "inputs": "cached"},
           "cp and fsync"),
    Figure("TSV-Merge {shape}, T=3, k = r // T", "FusionBench's function", "spectral.json", "tsv_merge", "eigen",
           "speed-up", {"shape": "2048x2048", "spectrum": "flat", "ranks": "k = r // T", "series": "spectra"},
           "FusionBench", short=True),
    Figure("TSV-Merge {shape}, k = r // T: the slowest of {count} sizes and T", "FusionBench's function",
           "spectral.json", "tsv_merge", "eigen", "speed-up", {"spectrum": "flat", "ranks": "k = r // T"},
           "FusionBench", "worst"),
    Figure("`tsvm`, the seven matrices of a trained Llama layer of width 2048, T=3", "FusionBench's function",
           "trained_layer.json", "trained_layer", "tsvm", "speed-up", {"deltas": "trained", "matrix": "the layer"},
           "FusionBench"),
    Figure("`rtsvm`, the same", "FusionBench's function", "trained_layer.json", "trained_layer", "rtsvm", "speed-up",
           {"deltas": "trained", "matrix": "the layer"}, "FusionBench"),
    Figure("TSV-Merge of three rank-16 LoRAs, {shape}, from their factors", "FusionBench's function, dense",
           "spectral.json", "tsv_merge", "factors", "speed-up", {"series": "LoRA"}, "FusionBench"),
    Figure("mergekit's command on our kernels, `{name}`: the fastest of {count}", "without", "mergekit_cli.json", None,
           "mergekit on our kernels", "speed-up", pick="best"),
    Figure("mergekit's command on our kernels, `{name}`: the slowest of {count}", "without", "mergekit_cli.json", None,
           "mergekit on our kernels", "speed-up", pick="worst"),
    Figure("FusionBench's TSVM on our solver, whole models", "without", "fusion_bench.json", None,
           "FusionBench on our solver", "speed-up"),
    Figure("PEFT's `add_weighted_adapter`, `svd`, {shape}, on our kernels", "without", "peft.json", "svd",
           "PEFT on our kernels", "speed-up", {"shape": "4096x4096"}),
)  # fmt: skip


def labels(row: Row) -> dict[str, Any]:
    """Return what `Figure.labels` may name."""
    return {"shape": "x".join(map(str, row["shape"] or ())), **row["options"]}


def matching(rows: Sequence[Row], figure: Figure) -> list[Row]:
    """Return the rows that a figure names."""
    found = [
        row for row in rows
        if row["metric"] == figure.metric and row["role"] == "ours"
        and figure.name in (None, row["name"]) and figure.provider in (None, row["provider"])
        and (figure.metric != "speed-up" or figure.other in (None, row["notes"].get("against")))
        and all(labels(row).get(key) in (value if isinstance(value, tuple) else (value,))
                for key, value in figure.labels.items())
    ]  # fmt: skip
    return (
        found if figure.other else [row for row in found if "mergekit" not in row["notes"].get("against", "")] or found
    )


def line(figure: Figure, results: Path, current: str | None) -> list[str]:
    """Return the cells of a figure: what, against, ours is, rounds, file.

    Raises:
        ValueError: no row, or more than one, is what the figure names.
    """
    rows = read_rows(results / "cpu" / figure.file)
    found = matching(rows, figure)
    if not found or (figure.pick == "only" and len(found) > 1):
        raise ValueError(f"{figure}: expected one row, found {len(found)}")
    row = (max if figure.pick == "best" else min)(found, key=lambda each: each["median"])
    cases = {(each["name"], str(labels(each) | {"series": None})) for each in found}
    what = figure.what.format(name=row["name"], shape=labels(row)["shape"], count=len(cases))
    text = cell(row)
    if figure.metric == "memory":
        (other,) = (each for each in rows if each["provider"] == figure.other and each["metric"] == "memory"
                    and labels(each) == labels(row) and each["name"] == row["name"])  # fmt: skip
        text = f"{text} instead of {cell(other)}"
    elif figure.metric == "share":
        text = f"at {text} of its rate"
    mark = f" {MARK}" if current is not None and older([row], current) else ""
    return [what + mark, figure.against, text, str(row["rounds"]), f"`{figure.file}`"]


def headlines(results: Path, current: str | None, short: bool = False) -> list[str]:
    """Return the table of headlines; `short`: the README's part."""
    chosen = [figure for figure in HEADLINES if figure.short or not short]
    lines = [line(figure, results, current) for figure in chosen if (results / "cpu" / figure.file).exists()]
    table = markdown(Sheet("", ["on two cores", "against", "ours is", "rounds", "file"], lines))
    return [*table, "", f"{MARK} measured on older code."] if any(MARK in cells[0] for cells in lines) else table


def losses(results: Path, current: str | None) -> list[str]:
    """Return how many times of ours are slower than torch's, by file of `rtsvm bench`."""
    lines = []
    for file in ("bench.json", "bench_full.json", "bench_compiled.json"):
        rows = read_rows(results / "cpu" / file)
        lines.append([f"`{file}`" + (f" {MARK}" if current is not None and older(rows, current) else "")])
        for role, provider in (("reference", None), ("torch", "torch, best"), ("torch", "torch.compile")):
            ratios = times_of_ours(rows, role, provider)
            lines[-1].append(f"{sum(ratio < 1 for ratio in ratios)} of {len(ratios)}" if ratios else "")
    columns = ["file", "slower than eager PyTorch", "than hand-optimised PyTorch", "than torch.compile"]
    return markdown(Sheet("", columns, lines))


def times_of_ours(rows: Sequence[Row], role: str, provider: str | None) -> list[float]:
    """Return time of the other / time of the fastest of ours, for every case that has both."""
    best: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in rows:
        if row["metric"] == "time" and row["median"] is not None and row["role"] in ("ours", role):
            if row["role"] != "ours" and provider not in (None, row["provider"]):
                continue
            case = best.setdefault((row["name"], labels(row)["matrix"], row["dtype"]), {})
            case[row["role"]] = min(row["median"], case.get(row["role"], row["median"]))
    return [case[role] / case["ours"] for case in best.values() if len(case) == 2]


def memory(results: Path) -> list[str]:
    """Return the peak memory by method and size of the checkpoints."""
    rows = [
        row
        for row in read_rows(results / "cpu" / "engine.json")
        if row["metric"] == "memory" and row["role"] == "ours" and row["options"]["inputs"] != "cached, beside mergekit"
    ]
    cells: dict[str, dict[str, str]] = {}
    for row in rows:
        cells.setdefault(row["options"]["checkpoint"], {})[row["name"]] = cell(row)
    methods = list(dict.fromkeys(row["name"] for row in rows))
    lines = [[checkpoint, *(found.get(name, "") for name in methods)] for checkpoint, found in cells.items()]
    return markdown(Sheet("", ["each of 3 checkpoints", *(f"peak memory of `{name}`" for name in methods)], lines))


def conditions(results: Path) -> list[str]:
    """Return how ill-conditioned the bases are, and what float32 SVDs lose."""
    rows = [row for name in ("spectral_accuracy.json", "spectral_accuracy_1024.json")
            for row in read_rows(results / "cpu" / name)]  # fmt: skip
    lines = []
    for ranks in ("k = r // T", "k = r // 4T"):
        of_ranks = [row for row in rows if row["options"]["ranks"] == ranks]
        found = sorted(row["median"] for row in of_ranks if row["metric"] == "condition")
        worst = max(row["median"] for row in of_ranks if row["provider"] == "float32 SVD")
        lines.append([ranks, str(len(found)), f"{statistics.median(found):.3g}", f"{found[-1]:.3g}", error(worst)])
    columns = ["ranks", "cases", "median condition", "largest condition", "largest error of float32 SVDs"]
    return markdown(Sheet("", columns, lines))


def honesty(results: Path) -> list[str]:
    """Return how many certificates were judged, over all functions."""
    rows = read_rows(results / "cpu" / "honesty.json")
    counts = {}
    for metric in ("calls", "dishonest", "arbitrary", "needless"):
        counts[metric] = f"{sum(row['median'] for row in rows if row['metric'] == metric):.0f}"
    counts["largest true / stated error"] = f"{max(row['median'] for row in rows if row['unit'] == 'ratio'):.2f}"
    return markdown(Sheet("", list(counts), [list(counts.values())]))


def shortcuts(results: Path) -> list[str]:
    """Return the error of every shortcut."""
    rows = read_rows(results / "cpu" / "shortcuts.json")
    (sheet,) = sheets(rows, "provider")
    cases = [f"{cells[0]}, {cells[1]}" for cells in sheet.lines]
    found = zip(sheet.columns[2:], *(cells[2:] for cells in sheet.lines), strict=True)
    lines = [[heading.removesuffix(": error"), *cells] for heading, *cells in found]
    return markdown(Sheet("", ["shortcut", *cases], lines))


def demo(results: Path) -> list[str]:
    """Return what the demo ends with."""
    rows = [row for row in read_rows(results / "quality" / "demo.json") if row["metric"] == "accuracy"]
    models: dict[str, list[float]] = {}
    for row in rows:
        models.setdefault(row["name"], []).append(row["median"])
    tasks = list(dict.fromkeys(row["options"]["task"] for row in rows))
    lines = [
        [name, *(f"{value:.1f}" for value in (*values, statistics.mean(values)))] for name, values in models.items()
    ]
    return markdown(Sheet("", ["model", *tasks, "mean"], lines))
