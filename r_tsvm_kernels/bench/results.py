"""The one format of results: rows that each say what was measured, where, and on which sources; and their file."""

from __future__ import annotations

import ast
import hashlib
import io
import json
import math
import platform
import re
import statistics
import tokenize
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..errors import ConfigError, OutputExistsError
from ..files import read_regular

# A row has all of these fields:
# - name: what was measured: an op, a function, a merge method, a command.
# - provider, role: who computed it; ours, reference (eager torch), torch (the best of torch), peer, or ceiling.
# - metric, unit: see `UNITS`.
# - shape, dtype: of the weight; null where there is no single one.
# - median, q1, q3, rounds: of the samples; null and 0 where there is no result (`notes` say why), quartiles null where
#   they are unknown.
# - options: what else was asked for: rows that differ in it are different cases.
# - notes: what else was found: status, reason, route, bound.
# - date, machine, versions, sources: when, where, with which libraries, and the hash of the code (null: unknown).
FIELDS = (
    "name", "provider", "role", "metric", "unit", "shape", "dtype", "median", "q1", "q3", "rounds", "options", "notes",
    "date", "machine", "versions", "sources",
)  # fmt: skip
UNITS = {
    "time": "s", "speed-up": "x", "memory": "B", "error": "relative", "share": "of the ceiling", "rate": "B/s",
    "arithmetic": "flop/s",
}  # fmt: skip
SCHEMA = 2
PACKAGE = Path(__file__).resolve().parents[1]
# Measuring, printing and the command line do not change what is measured.
NOT_MEASURED = ("bench", "cli", "report", "selfcheck")
_MOST_BYTES = 1 << 28  # of a file of results

Row = dict[str, Any]
Key = tuple[Any, ...]


def row(
    name: str,
    provider: str,
    metric: str,
    values: float | Sequence[float] | Mapping[str, float] | None,
    *,
    role: str = "ours",
    shape: Sequence[int] | None = None,
    dtype: str | None = None,
    options: Mapping[str, Any] | None = None,
    notes: Mapping[str, Any] | None = None,
    unit: str | None = None,
) -> Row:
    """Return a row without its circumstances, which `Results.add` fills in.

    Args:
        name: what was measured.
        provider: who computed it.
        metric: a key of `UNITS`, or any other with a `unit`.
        values: one sample per round, one number, a spread as of `quartiles`, or None for no result.
        role: of the provider.
        shape: of the weight.
        dtype: of the weight.
        options: settings that distinguish cases of one name.
        notes: what else was found.
        unit: of another metric.
    """
    if values is None:
        spread: Mapping[str, float | None] = {"median": None, "q1": None, "q3": None, "rounds": 0}
    elif isinstance(values, Mapping):
        spread = values
    else:
        spread = quartiles([values] if isinstance(values, int | float) else values)
    return {
        "name": name, "provider": provider, "role": role, "metric": metric, "unit": unit or UNITS[metric],
        "shape": None if shape is None else list(shape), "dtype": dtype, **spread, "options": dict(options or {}),
        "notes": dict(notes or {}),
    }  # fmt: skip


def case_of(row: Row) -> Key:
    """Return the fields that identify the case of a row: name, shape, dtype, options."""
    return row["name"], tuple(row["shape"] or ()), row["dtype"], json.dumps(row["options"], sort_keys=True)


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Return median, quartiles and number of rounds; all the same for one round."""
    if len(values) == 1:
        return {"median": values[0], "q1": values[0], "q3": values[0], "rounds": 1}
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "q1": low, "q3": high, "rounds": len(values)}


def ratios(slower: Sequence[float], faster: Sequence[float]) -> list[float]:
    """Return the ratio of each round; both sides took part in all of them."""
    return [a / b for a, b in zip(slower, faster, strict=True)]


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """Return p of the power law ``y ~ x^p``, by least squares of the logarithms; NaN for one point."""
    if len(x) < 2:
        return math.nan
    return statistics.linear_regression([math.log(value) for value in x], [math.log(value) for value in y]).slope


def circumstances(*packages: str) -> Row:
    """Return when, where and on which sources: the last fields of every row. `packages`: whose versions matter."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": {
            "cpu": cpu_model(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "threads": torch.get_num_threads(),
        },
        "versions": {"r_tsvm_kernels": __version__, "python": platform.python_version(), "torch": torch.__version__}
        | ({"cuda": torch.version.cuda} if torch.cuda.is_available() else {})
        | {name: version(name) for name in packages},
        "sources": source_hash(),
    }


def cpu_model() -> str:
    """Return the name of the processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


@cache
def source_hash(root: Path = PACKAGE.parent) -> str | None:
    """Return a hash of the code that is measured; None where the package was installed without its sources.

    It covers `csrc` and the package, except modules that only measure or print. Comments, docstrings and blank lines do
    not count.
    """
    native, package = root / "csrc", root / PACKAGE.name
    if not native.is_dir():
        return None
    found = [path for path in package.rglob("*.py") if path.relative_to(package).parts[0] not in NOT_MEASURED]
    found += [path for path in native.rglob("*") if path.suffix in {".h", ".cpp", ".cu", ".cuh"}]
    digest = hashlib.sha256()
    for path in sorted(found):
        text = path.read_text(encoding="utf-8")
        code = code_of(text) if path.suffix == ".py" else re.sub(r"//[^\n]*", "", text)
        lines = (line.rstrip() for line in code.splitlines())
        digest.update(f"{path.relative_to(root)}\n".encode() + "\n".join(filter(None, lines)).encode())
    return digest.hexdigest()[:16]


def code_of(text: str) -> str:
    """Return Python without comments and docstrings."""
    lines = text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            line = token.start[0] - 1
            lines[line] = lines[line][: token.start[1]]
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, documented) and ast.get_docstring(node):
            first = node.body[0]
            span = slice(first.lineno - 1, first.end_lineno)
            lines[span] = [""] * len(lines[span])
    return "\n".join(lines)


class Results:
    """Rows of one run, with its circumstances; the file is rewritten with every addition, so a stopped run keeps them.

    Args:
        path: of the file; None keeps the rows in memory only.
        packages: whose versions belong to the circumstances.
        replace: whether an existing file may be replaced.

    Raises:
        OutputExistsError: the file exists, and `replace` is not set.
    """

    def __init__(self, path: str | Path | None = None, packages: Sequence[str] = (), replace: bool = False) -> None:
        self.rows: list[Row] = []
        self.circumstances = circumstances(*packages)
        self.path = None if path is None else Path(path)
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self.path.open("a" if replace else "x").close()
        except FileExistsError:
            raise OutputExistsError(
                f"{self.path} exists and results are not overwritten: choose another name or remove it"
            ) from None

    def add(self, rows: Iterable[Row]) -> None:
        """Add rows and write the file."""
        self.rows += [row | self.circumstances for row in rows]
        if self.path is not None:
            write_rows(self.path, self.rows)


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write a file of results in one step, a line per row; fields in which all rows agree are written once."""
    common = {field: rows[0][field] for field in FIELDS if rows and all(row[field] == rows[0][field] for row in rows)}
    lines = [json.dumps({field: row[field] for field in FIELDS if field not in common}) for row in rows]
    head = f'{{"schema": {SCHEMA}, "common": {json.dumps(common, indent=1)}, "rows": [\n'
    part = path.with_name(path.name + ".part")
    part.write_text(head + ",\n".join(lines) + "\n]}\n", encoding="utf-8")
    part.replace(path)


def read_rows(path: str | Path) -> list[Row]:
    """Read a file of results.

    Raises:
        ConfigError: the file is missing or not a file of results, or a row lacks a field.
    """
    try:
        report = json.loads(read_regular(path, _MOST_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: expected results that `rtsvm bench --json` wrote: {error}") from error
    if not isinstance(report, dict) or report.get("schema") != SCHEMA:
        raise ConfigError(f"{path}: expected results that `rtsvm bench --json` wrote, of schema {SCHEMA}")
    rows = [report["common"] | row for row in report["rows"]]
    for found in rows:
        if set(found) != set(FIELDS):
            raise ConfigError(f"{path}: a row has not the fields of a result: {sorted(set(FIELDS) ^ set(found))}")
    return rows
