"""How `tables.py` reads results and writes numbers, the same way in every table."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Report = dict[str, Any]  # what a benchmark has written
Spread = dict[str, Any]  # median, q1, q3, rounds
ROOT = Path(__file__).resolve().parents[1]


def read(path: Path) -> Report:
    report: Report = json.loads(path.read_text())
    return report


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return a table in Markdown; cells hold what they should show, bars included."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return lines + ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]


def factor(ratio: Spread | float, digits: int = 2) -> str:
    """Time of the other side / ours as words; below one it is told the other way round, as a loss."""
    if isinstance(ratio, float):
        ratio = {"median": ratio, "q1": ratio, "q3": ratio}
    median, low, high, word = ratio["median"], ratio["q1"], ratio["q3"], "faster"
    if median < 1:
        median, low, high, word = 1 / median, 1 / high, 1 / low, "slower"
    if median >= 100:
        digits = 0
    elif median >= 10:
        digits = 1
    spread = f" ({low:.{digits}f} - {high:.{digits}f})" if low != high else ""
    return f"{median:.{digits}f} x {word}{spread}"


def share(ratio: Spread) -> str:
    return f"{ratio['median']:.2f} ({ratio['q1']:.2f} - {ratio['q3']:.2f})"


def seconds(time: Spread | float) -> str:
    """A time, with quartiles where there are some, in the unit that fits."""
    if isinstance(time, float):
        time = {"median": time, "q1": time, "q3": time}
    unit, name = (1.0, "s") if time["median"] >= 1 else (1e3, "ms")
    digits = 2 if time["median"] * unit < 100 else 0
    spread = f" ({unit * time['q1']:.{digits}f} - {unit * time['q3']:.{digits}f})" if time["q1"] != time["q3"] else ""
    return f"{unit * time['median']:.{digits}f} {name}{spread}"


def size(count: float) -> str:
    """Bytes, in decimal units."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def gigabytes(count: float) -> str:
    """Size of a checkpoint, as it is spoken of."""
    return f"{count / 1e9:.1f} GB" if count >= 5e8 else f"{count / 1e6:.0f} MB"


def error(value: float | None, digits: int = 0) -> str:
    """An error as 4e-7; empty for none."""
    if value is None:
        return ""
    if value == 0:
        return "0"
    mantissa, _, exponent = f"{value:.{digits}e}".partition("e")
    return f"{mantissa}e{int(exponent)}"


def shape(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))


def provenance(path: Path, report: Report, program: str) -> str:
    """The paragraph above the tables of a file: which file, where and from which commit, against which versions."""
    commit = f"commit `{report['commit'][:7]}`" if report["commit"] else "no commit"
    changed = ", with changes that were not committed" if report["dirty"] else ""
    threads = f"{report['threads']} thread{'s' if report['threads'] > 1 else ''}"
    versions = {name: version for name, version in report["versions"].items() if name != "r_tsvm_kernels"}
    ours = ", ".join(f"{name} {version}" for name, version in versions.items())
    peers = {name: version for name, version in report.get("peer_versions", {}).items() if name not in versions}
    against = "; against " + ", ".join(f"{name} {version}" for name, version in peers.items()) if peers else ""
    return (
        f"`{relative(path)}`, written by `{program}`: {report['cpu']}, {threads}; {report['date_utc'][:10]}, "
        f"{commit}{changed}; {ours}{against}."
    )


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name
