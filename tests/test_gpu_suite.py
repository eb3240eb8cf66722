"""The script for GPU machines works end to end; here with tiny sizes on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from r_tsvm_kernels.bench import REGISTRY
from r_tsvm_kernels.dispatch import ops

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_dry_run(tmp_path):
    environment = os.environ | {"OUT": str(tmp_path), "PYTHON": sys.executable}
    script = str(ROOT / "benchmarks" / "gpu_suite.sh")
    done = subprocess.run([script, "--dry-run"], env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, (tmp_path / "suite.log").read_text()[-3000:]
    stages = [line.split()[0] for line in done.stdout.splitlines()]
    assert stages == [
        "info", "tests", "products", "kernels", "dispatch", "layer", "ceilings", "model", "growth", "merges"
    ]  # fmt: skip
    found = {file.stem: json.loads(file.read_text()) for file in tmp_path.glob("*.json")}
    assert found.keys() == {
        "kernels", "merges", "dispatch_order", "layer", "model", "growth", "ceilings", "products"
    }  # fmt: skip
    for name in ("kernels", "merges", "layer"):  # checked against float64
        assert found[name]["complete"]
        assert {row["status"] for row in found[name]["rows"]} <= {"timed", "unavailable"}
    assert {row["name"] for name in ("kernels", "merges") for row in found[name]["rows"]} == set(REGISTRY)
    assert found["layer"]["layer_seconds"].keys() >= {"tsvm by eigen", "tsvm by float32 SVD"}
    assert found["dispatch_order"]["order"].keys() == ops().keys()
    measured = {
        "model": {"merge"},
        "growth": {"tsv_merge"},
        "ceilings": {"copy", "matmul", "eigh", "svd", "qr", "topk", "kthvalue", "sort", "published"},
        "products": {"symm_gram", "symm_square", "gemm3", "matmul", "leading_eigenspaces", "polar_express"},
    }
    for file, expected in measured.items():
        result = found[file]
        assert result["dry_run"] and all("error" not in row for row in result["rows"])
        assert {row["name"].split()[0] for row in result["rows"]} == expected
    # a CPU makes no GPU figures
    assert not any("gb_per_s" in row or "tflop_per_s" in row for row in found["ceilings"]["rows"])
    assert all(row["peak_device_bytes"] is None and row["peak_host_bytes"] > 0 for row in found["model"]["rows"])
    assert found["growth"]["exponents"].keys() == {"eigen, n", "eigen, T", "products, n", "products, T"}


@pytest.mark.slow
def test_one_stage(tmp_path):
    environment = os.environ | {"OUT": str(tmp_path), "PYTHON": sys.executable, "STAGES": "info"}
    script = str(ROOT / "benchmarks" / "gpu_suite.sh")
    done = subprocess.run([script, "--dry-run"], env=environment, capture_output=True, text=True, timeout=100)
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["info"]


def test_a_call_ends_with_its_budget_and_the_next_one_goes_on(tmp_path):
    environment = os.environ | {"OUT": str(tmp_path), "PYTHON": sys.executable}
    script = str(ROOT / "benchmarks" / "gpu_suite.sh")
    for stages, budget in (("info growth", "5"), ("growth", "0")):
        call = environment | {"STAGES": stages, "BUDGET": budget}
        done = subprocess.run([script, "--dry-run"], env=call, capture_output=True, text=True, timeout=100)
        assert done.returncode == 1
    lines = (tmp_path / "summary.txt").read_text().split("\n")[:-1]
    assert [line.split()[:3] for line in lines] == [
        ["info", "exit", "124"], ["growth", "exit", "124"], ["growth", "exit", "124"]
    ]  # fmt: skip
