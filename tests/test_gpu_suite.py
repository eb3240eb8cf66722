"""The script for GPU machines works end to end; here with tiny sizes on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_dry_run(tmp_path):
    environment = os.environ | {"OUT": str(tmp_path), "PYTHON": sys.executable}
    script = str(ROOT / "benchmarks" / "gpu_suite.sh")
    done = subprocess.run([script, "--dry-run"], env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, (tmp_path / "suite.log").read_text()[-3000:]
    stages = [line.split()[0] for line in done.stdout.splitlines()]
    assert stages == ["info", "tests", "ceilings", "elementwise", "products"]
    measured = {
        "ceilings": {"copy", "matmul", "task_statistics", "eigh", "svd", "published"},
        "elementwise_gpu": {"task_statistics", "magnitude_select", "reweight_prune", "elect_and_sum", "random_mask"},
        "products": {"symm_square", "symm_gram", "gemm3", "leading_eigenspaces", "polar_express", "tsv_merge"},
    }
    for file, expected in measured.items():
        result = json.loads((tmp_path / f"{file}.json").read_text())
        assert result["dry_run"] and all("error" not in row for row in result["rows"])
        assert {row["name"].split()[0] for row in result["rows"]} >= expected
        assert not any("WRONG" in row["name"] for row in result["rows"])
        # a CPU makes no GPU figures
        assert not any("gb_per_s" in row or "tflop_per_s" in row for row in result["rows"])


@pytest.mark.slow
def test_one_stage(tmp_path):
    environment = os.environ | {"OUT": str(tmp_path), "PYTHON": sys.executable, "STAGES": "info"}
    script = str(ROOT / "benchmarks" / "gpu_suite.sh")
    done = subprocess.run([script, "--dry-run"], env=environment, capture_output=True, text=True, timeout=100)
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["info"]
