"""The accuracy program runs, and its committed results keep the promises of the two modes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COMMITTED = ROOT / "benchmarks" / "results" / "cpu" / "spectral_accuracy.json"


def test_the_program_runs(tmp_path):
    file = tmp_path / "new" / "accuracy.json"
    program = [sys.executable, str(ROOT / "benchmarks" / "spectral_accuracy.py"), "--json", str(file)]
    options = ["--sizes", "48", "--tasks", "3", "--spectra", "flat", "power 1.2"]
    done = subprocess.run([*program, *options], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(file.read_text())["rows"]
    assert [row["case"] for row in rows] == ["flat, n 48, T 3"] * 2 + ["power 1.2, n 48, T 3"] * 2
    assert all(row["routes"]["eigen exact"]["error"] < 1e-6 for row in rows)
    assert len(done.stdout.splitlines()) == 4


@pytest.mark.parametrize(("mode", "allowed"), [("exact", 1e-4), ("fast", 1e-2)])
@pytest.mark.parametrize("solver", ["eigen", "products"])
def test_committed_results(mode, allowed, solver):
    rows = json.loads(COMMITTED.read_text())["rows"]
    assert len(rows) > 72 and any(row["case"].startswith("trained") for row in rows)
    for row in rows:
        route = row["routes"][f"{solver} {mode}"]
        assert route["error"] < allowed, row["case"]
        assert route["error"] < 2 * route["estimate"] + 1e-7, row["case"]  # the result is rounded to float32
        if solver == "eigen" and mode == "exact":
            assert route["error"] <= 2 * row["routes"]["float32 SVD"]["error"] + 1e-7, row["case"]
