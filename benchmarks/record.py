"""Where results lie in the repository, beside what `r_tsvm_kernels.bench` writes down and how it sums up."""

from __future__ import annotations

from pathlib import Path

from r_tsvm_kernels.bench.record import provenance, quartiles, ratios

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "cpu"

__all__ = ["RESULTS", "ROOT", "provenance", "quartiles", "ratios"]
