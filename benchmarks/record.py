"""What every benchmark writes down beside its numbers, and how it sums them up."""

from __future__ import annotations

import platform
import statistics
import subprocess
from collections.abc import Iterable
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from r_tsvm_kernels import __version__

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "cpu"


def provenance(*packages: str) -> dict[str, Any]:
    """When, where and from which sources; versions of torch and of `packages`."""
    return {
        "date_utc": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": git("rev-parse", "--verify", "--quiet", "HEAD"),
        "dirty": bool(git("status", "--porcelain", "--", ".", ":!benchmarks/results")),
        "cpu": cpu_model(),
        "threads": torch.get_num_threads(),
        "versions": {"r_tsvm_kernels": __version__, "python": platform.python_version(), "torch": torch.__version__}
        | {name: version(name) for name in packages},
    }


def git(*args: str) -> str | None:
    done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def quartiles(values: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "q1": low, "q3": high, "rounds": len(values)}


def ratios(slower: Iterable[float], faster: Iterable[float]) -> dict[str, float]:
    """Quartiles of the ratios of each round."""
    return quartiles([a / b for a, b in zip(slower, faster, strict=False)])
