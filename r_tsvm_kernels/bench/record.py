"""What every benchmark writes down beside its numbers, and how it sums them up."""

from __future__ import annotations

import json
import math
import platform
import statistics
import subprocess
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..errors import OutputExistsError

SOURCES = Path(__file__).resolve().parents[2]


def provenance(*packages: str) -> dict[str, Any]:
    """When, where and from which sources; versions of torch and of `packages`."""
    return {
        "date_utc": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": git("rev-parse", "--verify", "--quiet", "HEAD"),
        "dirty": bool(git("status", "--porcelain", "--", ".", ":!benchmarks/results")),
        "cpu": cpu_model(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "versions": {"r_tsvm_kernels": __version__, "python": platform.python_version(), "torch": torch.__version__}
        | ({"cuda": torch.version.cuda} if torch.cuda.is_available() else {})
        | {name: version(name) for name in packages},
    }


def git(*args: str) -> str | None:
    """Return what git says about the sources; None where the package was installed without them."""
    if not (SOURCES / ".git").exists():  # or git would answer for whatever repository lies around an environment
        return None
    try:
        done = subprocess.run(["git", *args], cwd=SOURCES, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def cpu_model() -> str:
    """Return the name of the processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Return median and quartiles, and of how many rounds; all the same for one."""
    if len(values) == 1:
        return {"median": values[0], "q1": values[0], "q3": values[0], "rounds": 1}
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "q1": low, "q3": high, "rounds": len(values)}


def ratios(slower: Iterable[float], faster: Iterable[float]) -> dict[str, float]:
    """Quartiles of the ratios of each round."""
    return quartiles([a / b for a, b in zip(slower, faster, strict=False)])


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """Return p of the power law ``y ~ x^p``, by least squares of the logarithms; NaN for one point."""
    if len(x) < 2:
        return math.nan
    return statistics.linear_regression([math.log(value) for value in x], [math.log(value) for value in y]).slope


class ResultFile:
    """A new JSON file, rewritten whenever there is more to keep, so that a run that is cut off keeps what it has."""

    def __init__(self, path: str | Path) -> None:
        """Create the file.

        Raises:
            OutputExistsError: something lies there already; results are never overwritten.
        """
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self.path.open("x").close()
        except FileExistsError:
            raise OutputExistsError(
                f"{self.path} exists and results are not overwritten: choose another name or remove it"
            ) from None

    def write(self, report: dict[str, Any]) -> None:
        """Put `report` in place of what is there, in one step."""
        replace_json(self.path, report)


def replace_json(path: Path, report: dict[str, Any]) -> None:
    """Write a JSON file in one step: whoever is stopped leaves the old one or the new one."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(report, indent=1) + "\n")
    part.replace(path)
