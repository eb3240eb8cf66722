"""Reports and comparisons as tables and plots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from ..errors import IntegrationError
from .comparison import Change

LEGEND = """\
ours          time of our fastest version (median), and which that is
eager torch   the same, written down in plain torch; of decompositions: by float32 SVDs
best torch    the same in torch by somebody who took pains, or by torch.compile, if there is a way
peer          time of the fastest other library that is installed, by its own function for the same merge of one weight;
              in brackets, by how many times ours is faster
speed-up      time of eager torch / ours (quartiles over rounds in which both ran); above 1 ours is faster
speed         rate of ours, and what part that is of a plain copy's or of a matrix product's, measured now; a copy in a
              cache may be faster than 100 %
memory        what ours needs beside inputs and result
error         of ours against float64, relative; what is further off than it may be is WRONG and has no time"""


# Columns of times beside ours.
ROLES = {"reference": "eager torch", "torch": "best torch", "peer": "peer"}


def legend(report: dict[str, Any]) -> str:
    """Return what the columns of the table mean."""
    lines = LEGEND.splitlines(keepends=True)
    if "peer" not in _roles(report):
        first = next(index for index, line in enumerate(lines) if line.startswith("peer"))
        del lines[first : first + 2]
    return "".join(lines)


def _roles(report: dict[str, Any]) -> list[str]:
    """Return the roles that have a column; peers have one only where there are any."""
    peers = any(row["role"] == "peer" for row in report["rows"])
    return [role for role in ROLES if role != "peer" or peers]


def result_table(report: dict[str, Any]) -> Table:
    """Return one line per benchmark and input."""
    roles = _roles(report)
    times = ["ours", *(ROLES[role] for role in roles)]
    columns = ("benchmark", "matrix", *times, "speed-up", "speed", "memory", "error")
    table = Table(title=_title(report))
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < 2 else "right", overflow="fold")
    for group in _by_input(report["rows"]):
        table.add_row(*_line(group, roles))
    return table


def _title(report: dict[str, Any]) -> str:
    where = report["gpu"] if report["device"] == "cuda" else f"{report['cpu']}, {report['threads']} threads"
    copy, matmul = report["ceilings"]["copy"] / 1e9, report["ceilings"]["matmul"] / 1e12
    warning = "; tiny sizes: these figures mean nothing" if report["suite"] == "dry-run" else ""
    return f"{where}: copies {copy:.1f} GB/s, multiplies {matmul:.2f} TFLOP/s{warning}"


def _by_input(rows: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["name"], row["matrix"], row["dtype"]), []).append(row)
    return list(groups.values())


def _line(group: list[dict[str, Any]], roles: Sequence[str]) -> list[str | Text]:
    ours = _fastest(group, "ours")
    first = group[0]
    line = [first["name"], f"{first['matrix']} {'x'.join(map(str, first['shape']))} {first['dtype']}"]
    line.append("no kernel here" if ours is None else f"{_time(ours)} {ours['provider']}")
    line += [_other(_fastest(group, role), ours) for role in roles]
    line += ["", "", "", ""] if ours is None else _measures(ours)
    bad = [f"{row['provider']} {row['status'].upper()}" for row in group if row["status"] in ("wrong", "failed")]
    last = [*([Text(line[-1])] if line[-1] else []), *(Text(words, "bold red") for words in bad)]
    return [*line[:-1], Text(", ").join(last)]


def _other(row: dict[str, Any] | None, ours: dict[str, Any] | None) -> str:
    """Return a time beside ours; of a peer with its name, and by how many times ours is faster."""
    if row is None:
        return ""
    if row["role"] != "peer":
        return _time(row)
    factor = "" if ours is None else f" ({row['seconds']['median'] / ours['seconds']['median']:.1f})"
    return f"{_time(row)} {row['provider']}{factor}"


def _measures(row: dict[str, Any]) -> list[str]:
    speedup = row.get("speedup")
    factor = "" if speedup is None else f"{speedup['median']:.1f} ({speedup['q1']:.1f} - {speedup['q3']:.1f})"
    rate = f"{row['gb_per_s']:.1f} GB/s" if row["ceiling"] == "copy" else f"{row['tflop_per_s']:.3f} TFLOP/s"
    extra = row["peak_extra_bytes"]
    memory = "" if extra is None else f"{extra / 1e6:.0f} MB"
    return [factor, f"{rate} {row['share']:.0%}", memory, f"{row['error']:.0e}"]


def _fastest(group: list[dict[str, Any]], role: str) -> dict[str, Any] | None:
    timed = [row for row in group if row["role"] == role and row["status"] == "timed"]
    return min(timed, key=lambda row: row["seconds"]["median"], default=None)


def _time(row: dict[str, Any]) -> str:
    milliseconds = 1e3 * float(row["seconds"]["median"])
    return f"{milliseconds:.2f} ms" if milliseconds < 1000 else f"{milliseconds / 1e3:.2f} s"


def change_table(changes: Sequence[Change]) -> Table:
    """Return one line per row that is in both reports."""
    table = Table("benchmark", "matrix", "run by", "before", "after", "after / before", "")
    for change in changes:
        name, matrix, dtype, _, provider = change.key
        style = {"slower": "bold red", "faster": "green"}.get(change.verdict, "")
        table.add_row(
            name,
            f"{matrix} {dtype}",
            provider,
            f"{1e3 * change.before:.2f} ms",
            f"{1e3 * change.after:.2f} ms",
            f"{change.ratio:.2f}",
            Text(change.verdict, style),
        )
    return table


def require_matplotlib() -> None:
    """Raise `IntegrationError` unless plots can be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise IntegrationError(
            f"plots need matplotlib, which does not load ({error}): pip install 'r-tsvm-kernels[bench]'"
        ) from error


def draw(report: dict[str, Any]) -> Any:
    """Return a matplotlib figure of by how much each benchmark is faster than eager torch.

    Raises:
        IntegrationError: matplotlib is missing.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    bars = []
    for group in _by_input(report["rows"]):
        row = _fastest(group, "ours")
        if row is not None and "speedup" in row:
            bars.append((f"{row['name']}, {row['matrix']} {row['dtype']}", row["speedup"]))
    figure = Figure(figsize=(8, 1.2 + 0.22 * max(len(bars), 1)), layout="constrained")
    axes = figure.subplots()
    medians = [speedup["median"] for _, speedup in bars]
    spread = [[s["median"] - s["q1"] for _, s in bars], [s["q3"] - s["median"] for _, s in bars]]
    colors = ["#4477aa" if median >= 1 else "#ee7733" for median in medians]
    widths = [median - 1 for median in medians]  # a bar starts at "as fast", to the left if ours is slower
    axes.barh(range(len(bars)), widths, left=1.0, xerr=spread, color=colors, ecolor="0.3", height=0.7)
    axes.set_yticks(range(len(bars)), [label for label, _ in bars], fontsize=7)
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.axvline(1.0, color="0.3", linewidth=1)
    axes.set_xlabel("times faster than eager torch (float32 SVDs for decompositions)")
    axes.set_title(_title(report), fontsize=8)
    return figure


def plot(report: dict[str, Any], path: str | Path) -> None:
    """Write `draw`'s figure to a file, in the format that its name says.

    Raises:
        IntegrationError: matplotlib is missing.
    """
    draw(report).savefig(path, dpi=140)
