"""The accuracy program runs, and its committed results keep the promises of the two modes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_the_program_runs(tmp_path):
    file = tmp_path / "new" / "accuracy.json"
    program = [sys.executable, str(ROOT / "benchmarks" / "spectral_accuracy.py"), "--json", str(file)]
    options = ["--sizes", "48", "--tasks", "3", "--spectra", "flat", "power 1.2"]
    done = subprocess.run([*program, *options], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(file.read_text())["rows"]
    assert [row["spectrum"] for row in rows] == ["flat", "power 1.2"]
    assert all(row["routes"]["exact"]["error"] < 1e-4 for row in rows)
    assert len(done.stdout.splitlines()) == 3


@pytest.mark.parametrize(("mode", "allowed"), [("exact", 3e-5), ("fast", 2e-2)])
def test_committed_results(mode, allowed):
    result = json.loads((ROOT / "benchmarks" / "results" / "cpu" / "spectral_accuracy.json").read_text())
    assert result["simulated"] and len(result["rows"]) == 54
    for row in result["rows"]:
        route = row["routes"][mode]
        assert route["error"] < allowed and route["error"] < 2 * route["error_estimate"], row["spectrum"]
        never = row["routes"][f"{mode}, never compressed"]  # where compression is needed, the estimate says so
        assert never["error"] < 2 * never["error_estimate"], row["spectrum"]
