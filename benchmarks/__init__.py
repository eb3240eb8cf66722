"""The project's own measurements: comparisons with peers, whole merges, accuracy, quality; and the pages they fill."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "cpu"
