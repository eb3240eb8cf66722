"""The accuracy program runs, and its committed results keep the promises of the two modes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from spectra import KINDS

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "cpu"
SMALL, LARGE = (
    "spectral_accuracy.json",
    "spectral_accuracy_1024.json",
)  # the latter without the products, too slow there


def test_the_program_runs(tmp_path):
    file = tmp_path / "new" / "accuracy.json"
    program = [sys.executable, str(ROOT / "benchmarks" / "spectral_accuracy.py"), "--json", str(file)]
    options = ["--sizes", "48", "--tasks", "3", "--spectra", "flat", "power 1.2"]
    done = subprocess.run([*program, *options], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(file.read_text())["rows"]
    assert [row["case"] for row in rows] == ["flat, n 48, T 3"] * 2 + ["power 1.2, n 48, T 3"] * 2
    for row in rows:
        errors = {name: route["error"] for name, route in row["routes"].items()}
        assert errors["eigen exact"] < 1e-6 and errors["products exact"] <= 2 * errors["float32 SVD"]
    assert len(done.stdout.splitlines()) == 4


def rows_of(name):
    return json.loads((RESULTS / name).read_text())["rows"]


def test_the_committed_results_are_complete():
    small, large = rows_of(SMALL), rows_of(LARGE)
    shares = {"k = r // T", "k = r // 4T"}
    for rows, sizes in ((small, (192, 512)), (large, (1024,))):
        wanted = {
            (f"{kind}, n {n}, T {t}", share) for kind in KINDS for n in sizes for t in (2, 3, 8) for share in shares
        }
        assert wanted <= {(row["case"], row["ranks"]) for row in rows}
    assert any(row["case"].startswith("trained") for row in small)
    for row in small + large:
        assert ("FusionBench" in row["routes"]) == (row["ranks"] == "k = r // T")
    # Float32 whitening is in the table: its error is far from that of float64.
    assert sum(row["routes"]["eigen exact"]["error"] > 1e-6 for row in large) > 10


@pytest.mark.parametrize(("mode", "allowed"), [("exact", 1e-4), ("fast", 1e-2)])
@pytest.mark.parametrize(("solver", "name"), [("eigen", SMALL), ("eigen", LARGE), ("products", SMALL)])
def test_committed_results(mode, allowed, solver, name):
    for row in rows_of(name):
        route = row["routes"][f"{solver} {mode}"]
        assert route["error"] <= allowed, row["case"]
        assert route["error"] < 2 * route["estimate"] + 1e-7, row["case"]  # the result is rounded to float32
        if mode == "exact":
            assert route["error"] <= 2 * row["routes"]["float32 SVD"]["error"], row["case"]
