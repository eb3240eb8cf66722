"""The script for GPU machines works end to end; here with tiny sizes on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from r_tsvm_kernels.bench import REGISTRY, read_rows
from r_tsvm_kernels.dispatch import ops

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
@pytest.mark.exhaustive
def test_dry_run(tmp_path):
    environment = os.environ | {"OUT": str(tmp_path), "PYTHON": sys.executable}
    script = str(ROOT / "benchmarks" / "gpu_suite.sh")
    done = subprocess.run([script, "--dry-run"], env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, (tmp_path / "suite.log").read_text()[-3000:]
    stages = [line.split()[0] for line in done.stdout.splitlines()]
    assert stages == [
        "info",
        "selfcheck",
        "tests",
        "products",
        "kernels",
        "dispatch",
        "layer",
        "ceilings",
        "model",
        "merges",
    ]
    order = json.loads((tmp_path / "dispatch_order.json").read_text())["order"]
    assert order.keys() == ops().keys()
    files = {"kernels", "merges", "layer", "model", "ceilings", "products"}
    assert {file.stem for file in tmp_path.glob("*.json")} == files | {"dispatch_order"}
    found = {name: read_rows(tmp_path / f"{name}.json") for name in files}
    for rows in found.values():
        assert {row["notes"].get("status") for row in rows} <= {None, "unavailable"}  # none is wrong or failed
        assert any(row["options"].get("dry_run") for row in rows)
    measured = {
        "layer": {"tsvm", "rtsvm: density 0.3"},
        "model": {"merge task_arithmetic", "merge rtsvm products", "merge rtsvm eigen"},
        "ceilings": {"copy", "matmul", "eigh", "svd", "qr", "topk", "kthvalue", "sort", "tsv_merge as published"},
        "products": {"symm_gram", "symm_square", "gemm3", "matmul", "leading_eigenspaces", "polar_express"},
    }
    for file, expected in measured.items():
        assert {row["name"] for row in found[file] if row["role"] != "ceiling"} == expected
    names = {row["name"] for name in ("kernels", "merges") for row in found[name] if row["role"] != "ceiling"}
    assert names == set(REGISTRY)
    layer = {(row["name"], row["provider"]) for row in found["layer"] if row["options"].get("matrix") == "one layer"}
    assert layer >= {("tsvm", "eigen"), ("tsvm", "float32 SVD")}
    # a CPU makes no GPU figures
    assert not any(row["metric"] in ("rate", "arithmetic") for row in found["ceilings"])
    memory = {row["metric"]: row["median"] for row in found["model"]}
    assert memory["device memory"] is None and memory["memory"] > 0


@pytest.mark.slow
def test_one_stage(tmp_path):
    environment = os.environ | {"OUT": str(tmp_path), "PYTHON": sys.executable, "STAGES": "info"}
    script = str(ROOT / "benchmarks" / "gpu_suite.sh")
    done = subprocess.run([script, "--dry-run"], env=environment, capture_output=True, text=True, timeout=100)
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["info"]


def test_a_call_ends_with_its_budget_and_the_next_one_goes_on(tmp_path):
    environment = os.environ | {"OUT": str(tmp_path), "PYTHON": sys.executable}
    script = str(ROOT / "benchmarks" / "gpu_suite.sh")
    for stages, budget in (("info merges", "5"), ("merges", "0")):
        call = environment | {"STAGES": stages, "BUDGET": budget}
        done = subprocess.run([script, "--dry-run"], env=call, capture_output=True, text=True, timeout=100)
        assert done.returncode == 1
    lines = (tmp_path / "summary.txt").read_text().split("\n")[:-1]
    assert [line.split()[:3] for line in lines] == [
        ["info", "exit", "124"], ["merges", "exit", "124"], ["merges", "exit", "124"]
    ]  # fmt: skip
