"""The plot of `rtsvm bench`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import IntegrationError
from .results import Row, case_of
from .table import fastest, where


def require_matplotlib() -> None:
    """Raise `IntegrationError` unless plots can be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise IntegrationError(
            f"plots need matplotlib, which does not load ({error}): pip install 'r-tsvm-kernels[bench]'"
        ) from error


def draw(rows: Sequence[Row]) -> Any:
    """Return a matplotlib figure of the speed-ups over eager torch.

    Raises:
        IntegrationError: matplotlib is missing.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    bars = []
    for case in dict.fromkeys(map(case_of, rows)):
        line = [row for row in rows if case_of(row) == case]
        ours = fastest(line, "ours")
        if ours is not None:
            label = f"{ours['name']}, {ours['options'].get('matrix', '')} {ours['dtype']}"
            bars += [(label, row) for row in line
                     if (row["metric"], row["provider"]) == ("speed-up", ours["provider"])]  # fmt: skip
    figure = Figure(figsize=(8, 1.2 + 0.22 * max(len(bars), 1)), layout="constrained")
    axes = figure.subplots()
    medians = [row["median"] for _, row in bars]
    spread = [[row["median"] - row["q1"] for _, row in bars], [row["q3"] - row["median"] for _, row in bars]]
    colors = ["#4477aa" if median >= 1 else "#ee7733" for median in medians]
    widths = [median - 1 for median in medians]  # a bar starts at "as fast", to the left if ours is slower
    axes.barh(range(len(bars)), widths, left=1.0, xerr=spread, color=colors, ecolor="0.3", height=0.7)
    axes.set_yticks(range(len(bars)), [label for label, _ in bars], fontsize=7)
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.axvline(1.0, color="0.3", linewidth=1)
    axes.set_xlabel("times faster than eager torch (float32 SVDs for decompositions)")
    axes.set_title(where(rows), fontsize=8)
    return figure


def plot(rows: Sequence[Row], path: str | Path) -> None:
    """Write `draw`'s figure to a file, in the format that its name says.

    Raises:
        IntegrationError: matplotlib is missing.
    """
    draw(rows).savefig(path, dpi=140)
