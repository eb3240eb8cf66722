"""The accuracy program runs, and its committed results keep the promises of the two modes."""

import subprocess
import sys
from pathlib import Path

import pytest
from spectra import KINDS

from r_tsvm_kernels.bench import read_rows

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "cpu"
# The latter without the products, which are too slow there.
SMALL, LARGE = "spectral_accuracy.json", "spectral_accuracy_1024.json"


def cases_of(path):
    """Return by matrices and ranks the error rows by route."""
    found = {}
    for row in read_rows(path):
        if row["metric"] == "error":
            key = row["options"]["matrices"], row["options"]["ranks"]
            found.setdefault(key, {})[row["provider"]] = row
    return found


def test_the_program_runs(tmp_path):
    file = tmp_path / "new" / "accuracy.json"
    program = [sys.executable, "-m", "benchmarks.spectral_accuracy", "--json", str(file)]
    options = ["--sizes", "48", "--tasks", "3", "--spectra", "flat", "power 1.2"]
    done = subprocess.run([*program, *options], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-2000:]
    cases = cases_of(file)
    assert [matrices for matrices, _ in cases] == ["flat, n 48, T 3"] * 2 + ["power 1.2, n 48, T 3"] * 2
    for routes in cases.values():
        errors = {name: row["median"] for name, row in routes.items()}
        assert errors["eigen exact"] < 1e-6 and errors["products exact"] <= 2 * errors["float32 SVD"]
    assert len(done.stderr.splitlines()) == 4 and "products fp16" in done.stdout


def test_the_committed_results_are_complete():
    small, large = cases_of(RESULTS / SMALL), cases_of(RESULTS / LARGE)
    shares = {"k = r // T", "k = r // 4T"}
    for cases, sizes in ((small, (192, 512)), (large, (1024,))):
        wanted = {
            (f"{kind}, n {n}, T {t}", share) for kind in KINDS for n in sizes for t in (2, 3, 8) for share in shares
        }
        assert wanted <= cases.keys()
    assert any(matrices.startswith("trained") for matrices, _ in small)
    for (_, ranks), routes in [*small.items(), *large.items()]:
        assert ("FusionBench" in routes) == (ranks == "k = r // T")
    # Float32 whitening is in the table: its error is far from that of float64.
    assert sum(routes["eigen exact"]["median"] > 1e-6 for routes in large.values()) > 10


@pytest.mark.parametrize(("mode", "allowed"), [("exact", 1e-4), ("fast", 1e-2)])
@pytest.mark.parametrize(("solver", "name"), [("eigen", SMALL), ("eigen", LARGE), ("products", SMALL)])
def test_committed_results(mode, allowed, solver, name):
    for case, routes in cases_of(RESULTS / name).items():
        route = routes[f"{solver} {mode}"]
        assert route["median"] <= allowed, case
        assert route["median"] < 2 * route["notes"]["estimate"] + 1e-7, case  # the result is rounded to float32
        if mode == "exact":
            assert route["median"] <= 2 * routes["float32 SVD"]["median"], case
