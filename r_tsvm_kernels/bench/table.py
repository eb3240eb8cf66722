"""The one printer of results: rows as tables, for the terminal and for the pages of the documentation."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

from rich.table import Table
from rich.text import Text

from .comparison import Change
from .results import Row, case_of

# Headings of the times by role.
ROLES = {"ours": "ours", "reference": "eager torch", "torch": "best torch", "peer": "peer"}
LEGEND = {
    "ours": "median time of our fastest version, and what ran: kernels on the cpu, in cuda or triton; the solver eigen "
    "or products; or LoRA factors, without forming their product",
    "eager torch": "the same computation in plain PyTorch; decompositions by float32 SVDs",
    "best torch": "a hand-optimised PyTorch version or torch.compile, whichever is faster",
    "peer": "the fastest other library that is installed, through its own function for the same merge of one weight",
    "speed-up": "time of eager torch / time of ours in interleaved runs; quartiles from 4 rounds on; `as fast` where "
    "they include 1",
    "over peer": "the same with the time of the peer",
    "rounds": "number of interleaved runs; a range where the times of a line come from different ones",
    "share": "rate of ours relative to a plain copy or a float32 matrix product on this machine; a copy within a cache "
    "can exceed 100 %",
    "memory": "peak memory besides inputs and result",
    "error": "relative error of ours against float64; a result beyond its limit is reported as WRONG and not timed",
}
QUARTILES_FROM = 4  # rounds
MOST_COLUMNS = 9  # of a table that has fewer lines than that
WIDE = 120  # columns of a terminal that shows everything
MARK = "†"
OF_OURS = ("speed-up", "share", "memory", "error")


class Sheet(NamedTuple):
    """A table of text: a title with everything that all lines share, columns, and lines of cells."""

    title: str
    columns: list[str]
    lines: list[list[str]]


# --- cells ---------------------------------------------------------------------------------------------------------


def cell(row: Row, short: bool = False) -> str:
    """Return the value of a row in the unit that fits; `short` leaves quartiles out."""
    value = row["median"]
    if value is None:
        return str(row["notes"].get("status", "")).upper()
    if row["unit"] == "x":
        return factor(row, short)
    form: Callable[[float], str] = {
        "s": seconds, "B": size, "relative": error, "of the ceiling": share, "%": lambda x: f"{x:.1f}"
    }.get(row["unit"], lambda x: f"{x:.4g}")  # fmt: skip
    return form(value)


def factor(ratio: Row, short: bool = False) -> str:
    """Return the time of the other side / ours in words: faster, slower, or as fast if its quartiles include 1."""
    median, low, high, rounds = (ratio[name] for name in ("median", "q1", "q3", "rounds"))
    if low is not None and low <= 1 <= high and (low, high) != (median, median):
        return "as fast"
    word = "faster"
    if median < 1:
        median, word = 1 / median, "slower"
        low, high = (None, None) if low is None else (1 / high, 1 / low)
    digits = 0 if median >= 100 else 1 if median >= 10 else 2
    if digits == 2 and f"{median:.2f}" == "1.00":
        return "as fast"
    spread = f" ({low:.{digits}f} - {high:.{digits}f})" if low is not None and rounds >= QUARTILES_FROM else ""
    return f"{median:.{digits}f} x {word}{'' if short else spread}"


def seconds(value: float) -> str:
    """Return a time with three digits."""
    for unit, name in ((1.0, "s"), (1e3, "ms"), (1e6, "us")):
        if value * unit >= 1 or name == "us":
            break
    scaled = value * unit
    return f"{scaled:.{max(0, 2 - len(str(int(scaled))) + 1)}f} {name}"


def size(count: float) -> str:
    """Return bytes in decimal units."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def error(value: float) -> str:
    """Return an error as 4.2e-7."""
    if value == 0:
        return "0"
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}"


def share(value: float) -> str:
    """Return a share in percent."""
    return f"{value:.0%}"


# --- tables --------------------------------------------------------------------------------------------------------


def sheets(
    rows: Sequence[Row],
    by: Literal["role", "provider"],
    metrics: Sequence[str] | None = None,
    split: Sequence[str] = (),
    short: bool = False,
    current: str | None = None,
) -> list[Sheet]:
    """Return rows as tables, one line per case.

    Args:
        rows: of any number of cases; ceilings are left out.
        by: columns of times per ``role``, where the fastest of a role is shown, and other metrics of the fastest of
            ours; or columns for every ``provider`` and metric.
        metrics: to be shown, in this order; by default all but times in the order of `OF_OURS`, or as they come.
        split: labels (``shape``, ``dtype``, or an option) for whose values there are tables of their own.
        short: leave quartiles out.
        current: hash of the sources; lines of other sources are marked, unless all are.
    """
    groups: dict[str, list[Row]] = {}
    for row in (row for row in rows if row["role"] != "ceiling"):
        groups.setdefault(json.dumps([_labels(row).get(name) for name in split]), []).append(row)
    return [_sheet(group, by, metrics, short, current) for group in groups.values()]


def _labels(row: Row) -> dict[str, Any]:
    """Return the labels that distinguish cases of one name."""
    shape = "x".join(map(str, row["shape"])) if row["shape"] else None
    found = {"matrix": None, "shape": shape, "dtype": row["dtype"]} | row["options"]
    return {name: value for name, value in found.items() if value is not None}


def _sheet(rows: Sequence[Row], by: str, metrics: Sequence[str] | None, short: bool, current: str | None) -> Sheet:
    lines: dict[Any, list[Row]] = {}
    for row in rows:
        lines.setdefault(case_of(row), []).append(row)
    labels = [_labels(line[0]) for line in lines.values()]
    names = list(dict.fromkeys(name for found in labels for name in found))
    values = {name: {str(found.get(name, "")) for found in labels} for name in names}
    varying = [name for name in names if len(values[name]) > 1]
    columns = _by_role(rows, metrics, short) if by == "role" else _by_provider(rows, metrics, short)
    rounds = any(_rounds(line) for line in lines.values())
    # A name that all lines share is not a column if something else distinguishes them.
    named = by == "role" or not varying or len({line[0]["name"] for line in lines.values()}) > 1
    common = [_label(name, labels[0][name]) for name in names if name not in varying]
    title = ", ".join(common if named else [rows[0]["name"], *common])
    cells = []
    for line, found in zip(lines.values(), labels, strict=True):
        labelled = [*([line[0]["name"]] if named else []), *(str(found.get(name, "")) for name in varying)]
        bad = [f"{row['provider']} {cell(row)}" for row in line if row["notes"].get("status") in ("wrong", "failed")]
        mark = f" {MARK}" if current is not None and older(line, current) and not older(rows, current) else ""
        cells.append([
            "; ".join([labelled[0] + mark, *bad]), *labelled[1:], *(make(line) for _, make in columns),
            *([_rounds(line)] if rounds else []),
        ])  # fmt: skip
    leading = [*(["case"] if named else []), *varying]
    return Sheet(title, [*leading, *(name for name, _ in columns), *(["rounds"] if rounds else [])], cells)


def _label(name: str, value: Any) -> str:
    if name == "tasks":
        return f"{value} tasks"
    return str(value) if name in ("matrix", "shape", "dtype", "device", "checkpoint", "inputs") else f"{name} {value}"


Column = tuple[str, Callable[[Sequence[Row]], str]]


def _by_role(rows: Sequence[Row], metrics: Sequence[str] | None, short: bool) -> list[Column]:
    roles = {row["role"] for row in rows} | {"ours", "reference"}

    def time_of(role: str) -> Callable[[Sequence[Row]], str]:
        def make(line: Sequence[Row]) -> str:
            row = fastest(line, role)
            if row is None:
                return "no kernel" if role == "ours" else ""
            return cell(row) + (f" {row['provider']}" if role in ("ours", "peer") else "")

        return make

    def metric_of(metric: str, role: str = "reference") -> Callable[[Sequence[Row]], str]:
        def make(line: Sequence[Row]) -> str:
            ours, other = fastest(line, "ours"), fastest(line, role)
            against = {None, other["provider"]} if other else {None}
            found = [row for row in line if ours and (row["metric"], row["provider"]) == (metric, ours["provider"])
                     and row["notes"].get("against") in against]  # fmt: skip
            return cell(found[0], short) if found else ""

        return make

    columns = [(heading, time_of(role)) for role, heading in ROLES.items() if role in roles]
    for metric in OF_OURS if metrics is None else metrics:
        columns.append((metric, metric_of(metric)))
        if metric == "speed-up" and "peer" in roles:
            columns.append(("over peer", metric_of(metric, "peer")))
    return columns


def _by_provider(rows: Sequence[Row], metrics: Sequence[str] | None, short: bool) -> list[Column]:
    def key(row: Row) -> tuple[str, str, str]:
        return row["metric"], row["provider"], row["notes"].get("against", "")

    def make(wanted: tuple[str, str, str]) -> Callable[[Sequence[Row]], str]:
        return lambda line: next((cell(row, short) for row in line if key(row) == wanted), "")

    shown = dict.fromkeys(row["metric"] for row in rows) if metrics is None else metrics
    keys = [found for metric in shown for found in dict.fromkeys(map(key, rows)) if found[0] == metric]
    sole = {metric for metric in shown if len({found for found in keys if found[0] == metric}) == 1}
    return [(_heading(*found, found[0] in sole), make(found)) for found in keys]


def _heading(metric: str, provider: str, against: str, sole: bool) -> str:
    if metric == "time":
        return provider
    if metric == "speed-up":
        return f"{provider} against {against}"
    return metric if sole else f"{provider}: {metric}"


def _rounds(line: Sequence[Row]) -> str:
    found = sorted({row["rounds"] for row in line if row["unit"] in ("s", "x") and row["median"] is not None})
    return "" if not found else str(found[0]) if len(found) == 1 else f"{found[0]} - {found[-1]}"


def fastest(rows: Iterable[Row], role: str) -> Row | None:
    """Return the time of the fastest provider of a role."""
    timed = [row for row in rows if row["role"] == role and row["metric"] == "time" and row["median"] is not None]
    return min(timed, key=lambda row: row["median"], default=None)


def older(rows: Iterable[Row], current: str) -> bool:
    """Return whether rows were measured on other sources than `current`, or on unknown ones."""
    return all(row["sources"] != current for row in rows)


def fitting(sheet: Sheet) -> Sheet:
    """Return the table with lines and columns swapped where it is wide and short."""
    if len(sheet.columns) <= MOST_COLUMNS or len(sheet.lines) >= MOST_COLUMNS:
        return sheet
    first, *others = zip(sheet.columns, *sheet.lines, strict=True)
    return Sheet(sheet.title, list(first), list(map(list, others)))


def markdown(sheet: Sheet) -> list[str]:
    """Return the lines of a table in Markdown, without its title."""
    lines = ["| " + " | ".join(sheet.columns) + " |", "|" + "---|" * len(sheet.columns)]
    return lines + ["| " + " | ".join(text.replace("|", "\\|") for text in line) + " |" for line in sheet.lines]


# --- the terminal --------------------------------------------------------------------------------------------------


def where(rows: Sequence[Row]) -> str:
    """Return on what machine rows were measured, and its ceilings."""
    machine = rows[0]["machine"]
    found = {row["name"]: row for row in rows if row["role"] == "ceiling"}
    name = machine["gpu"] if any(row["options"].get("device") == "cuda" for row in rows) else machine["cpu"]
    text = f"{name}, {machine['threads']} thread{'s' if machine['threads'] > 1 else ''}"
    if found:
        copy, matmul = found["copy"]["median"] / 1e9, found["matmul"]["median"] / 1e12
        text += f": copies {copy:.1f} GB/s, multiplies {matmul:.2f} TFLOP/s"
        if found["copy"]["options"].get("dry_run"):
            text += "; tiny sizes, the figures mean nothing"
    return text


def result_tables(rows: Sequence[Row], width: int, by: Literal["role", "provider"] = "role") -> list[Table]:
    """Return one table per matrix and dtype; a narrow terminal gets fewer columns."""
    narrow = width < WIDE
    split = ("matrix", "shape", "dtype") if by == "role" else ()
    metrics = ("speed-up",) if narrow and by == "role" else None
    return [rich_table(sheet) for sheet in sheets(rows, by, metrics, split, narrow)]


def rich_table(sheet: Sheet) -> Table:
    """Return a table for the terminal."""
    table = Table(title=sheet.title, title_justify="left", box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for index, column in enumerate(sheet.columns):
        table.add_column(column, justify="right" if index else "left", overflow="fold")
    for line in sheet.lines:
        bad = any(word in line[0] for word in ("WRONG", "FAILED"))
        table.add_row(Text(line[0], "bold red" if bad else ""), *map(Text, line[1:]))
    return table


def legend(rows: Sequence[Row], width: int) -> str:
    """Return the meaning of the columns that a terminal of this width shows."""
    roles = {row["role"] for row in rows}
    hidden = {ROLES[role] for role in ("torch", "peer") if role not in roles}
    hidden |= {"over peer"} if "peer" not in roles else set()
    if width < WIDE:
        hidden |= {"share", "memory", "error"}
    return "\n".join(
        textwrap.fill(text.replace("`", ""), width, initial_indent=f"{name:12}", subsequent_indent=" " * 12)
        for name, text in LEGEND.items()
        if name not in hidden
    )


def change_table(changes: Sequence[Change]) -> Table:
    """Return one line per time of ours."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for column in ("case", "matrix", "ran", "before", "after", "after / before", ""):
        table.add_column(column, overflow="fold")
    for change in changes:
        row = change.row
        if row["role"] == "ours":
            style = {"slower": "bold red", "faster": "green"}.get(change.verdict, "")
            times = seconds(change.before), seconds(change.after), f"{change.ratio:.2f}"
            matrix = f"{row['options'].get('matrix', '')} {row['dtype']}"
            table.add_row(row["name"], matrix, row["provider"], *times, Text(change.verdict, style))
    return table
