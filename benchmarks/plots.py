"""The plots under docs/plots: SVG that is the same for the same data, and names the data that it was drawn from."""

from __future__ import annotations

import hashlib
import math
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.quality.analysis import comparable, load, merged
from benchmarks.quality.study import SUITES, TABLE, label, rtsvm_defaults
from r_tsvm_kernels.bench import exponent, read_rows
from r_tsvm_kernels.bench.plot import draw, require_matplotlib

DEFAULT, TUNED = "#ee7733", "#4477aa"


def bench(data: Sequence[Path]) -> Any:
    return draw(read_rows(data[0]))


def growth(data: Sequence[Path]) -> Any:
    """Time of TSV-Merge against n and T, ours and FusionBench's."""
    rows = [row for row in read_rows(data[0]) if row["metric"] == "time"]
    figure = new_figure(9, 3.6)
    for axes, axis in zip(figure.subplots(1, 2), "nT", strict=True):
        for provider, name in (("FusionBench", "FusionBench"), ("eigen", "r_tsvm_kernels")):
            found = [row for row in rows
                     if (row["options"]["series"], row["provider"]) == (f"growth with {axis}", provider)]  # fmt: skip
            x = [row["shape"][0] if axis == "n" else row["options"]["tasks"] for row in found]
            y = [row["median"] for row in found]
            axes.loglog(x, y, "o-", label=f"{name}, {axis}^{exponent(x, y):.2f}")
        axes.set_xticks(x, list(map(str, x)), fontsize=8)
        axes.set_xticks([], minor=True)
        axes.set_xlabel("n (T = 3)" if axis == "n" else f"T (n = {found[0]['shape'][0]})")
        axes.set_ylabel("seconds")
        axes.grid(True, alpha=0.3)
        axes.legend()
    machine = rows[0]["machine"]
    figure.suptitle(f"TSV-Merge at k = n // T, {machine['cpu']}, {machine['threads']} threads", fontsize=9)
    return figure


def quality(data: Sequence[Path]) -> Any:
    """Mean accuracy by method and suite on the held-out seeds, with its standard error."""
    results, default = comparable(load(data[0].parent)), label(rtsvm_defaults())
    names = {name: name for name, _, _ in TABLE} | {"rtsvm": default}
    rows = math.ceil(len(results) / 4)
    columns = math.ceil(len(results) / rows)
    figure = new_figure(9, 0.6 + 4 * rows)
    for index, (suite, groups) in enumerate(results.items()):
        axes = figure.add_subplot(rows, columns, index + 1)
        seeds = groups["held_out"]
        for setting, color, shift in (("default", DEFAULT, -0.15), ("tuned", TUNED, 0.15)):
            values = [[merged(key, setting, "accuracy")(seed) for seed in seeds] for key in names.values()]
            means = [statistics.mean(each) for each in values]
            errors = [statistics.stdev(each) / math.sqrt(len(each)) for each in values]
            heights = [height + shift for height in range(len(names))]
            axes.errorbar(means, heights, xerr=errors, fmt="o", markersize=3.5, color=color, capsize=2, label=setting)
        base = statistics.mean(statistics.mean(seed["base"]["accuracy"]) for seed in seeds)
        axes.axvline(base, color="0.3", linewidth=1, linestyle=":", label="base")
        axes.set_title(suite, fontsize=9)
        axes.set_xlabel("accuracy, %")
        axes.grid(True, axis="x", alpha=0.3)
        axes.set_yticks(range(len(names)), list(names) if index % columns == 0 else [""] * len(names), fontsize=8)
        axes.invert_yaxis()
    axes.legend(fontsize=7)
    count = len(seeds)
    figure.suptitle(f"Mean accuracy of merged models, standard error over {count} held-out seeds", fontsize=9)
    return figure


def new_figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


class Plot(NamedTuple):
    """A picture and the result files that it shows."""

    data: tuple[str, ...]  # below benchmarks/results
    figure: Callable[[Sequence[Path]], Any]


PLOTS = {
    "bench.svg": Plot(("cpu/bench.json",), bench),
    "growth.svg": Plot(("cpu/spectral.json",), growth),
    "quality.svg": Plot(tuple(f"quality/{suite}.json" for suite in SUITES), quality),
}


def digest(data: Sequence[Path]) -> str:
    return hashlib.sha256(b"".join(hashlib.sha256(path.read_bytes()).digest() for path in data)).hexdigest()


def source(data: Sequence[Path]) -> str:
    return f"{', '.join(path.name for path in data)}; sha256 {digest(data)}"


def stale(results: Path, pictures: Path) -> list[str]:
    """Return the plots that are missing or were drawn from other data; those without data do not count."""
    present = {name: existing(plot, results) for name, plot in PLOTS.items()}
    return [name for name, data in present.items() if data and drawn_from(pictures / name) != source(data)]


def existing(plot: Plot, results: Path) -> list[Path]:
    return [results / file for file in plot.data if (results / file).exists()]


def drawn_from(picture: Path) -> str | None:
    """Return the data that a plot names as its source."""
    found = re.search(r"<dc:source>([^<]*)</dc:source>", picture.read_text()) if picture.exists() else None
    return found[1] if found else None


def write(name: str, results: Path, pictures: Path) -> None:
    """Draw one plot.

    Raises:
        IntegrationError: matplotlib is missing.
    """
    require_matplotlib()
    import matplotlib

    plot = PLOTS[name]
    data = existing(plot, results)
    pictures.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "path"}):
        metadata = {"Source": source(data), "Date": None, "Creator": None}
        plot.figure(data).savefig(pictures / name, metadata=metadata)
    # Remove matplotlib's trailing blanks, which the repository's checks refuse.
    path = pictures / name
    path.write_text("".join(f"{line.rstrip()}\n" for line in path.read_text().splitlines()))
