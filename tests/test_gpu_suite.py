"""The script for GPU machines works end to end; here with tiny sizes on the CPU."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from r_tsvm_kernels.bench import DECAYING, read_rows
from r_tsvm_kernels.dispatch import ops

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "gpu_suite.sh"
STAGES = ["selfcheck", "info", "products", "layer", "kernels", "model"]
ELEMENT_WISE = {"task_statistics", "magnitude_select", "reweight_prune", "elect_and_sum", "add_update"}


def dry_run(folder, timeout, **variables):
    environment = os.environ | {"OUT": str(folder), "PYTHON": sys.executable, "RTSVM_CACHE": str(folder / "cache")}
    command = [str(SCRIPT), "--dry-run"]
    return subprocess.run(command, env=environment | variables, capture_output=True, text=True, timeout=timeout)


def stages_of(done):
    return [line.split()[0] for line in done.stdout.splitlines()]


def rows_of(folder, *files):
    found = {name: read_rows(folder / f"{name}.json") for name in files}
    for rows in found.values():
        assert {row["notes"].get("status") for row in rows} <= {None, "unavailable"}  # none is wrong or failed
        assert any(row["options"].get("dry_run") for row in rows)
    return found


def names_in(rows):
    return {row["name"] for row in rows if row["role"] != "ceiling"}


@pytest.mark.slow
@pytest.mark.exhaustive
def test_dry_run(tmp_path):
    out = tmp_path / "out"
    done = dry_run(out, 3000, RTSVM_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 0, (out / "suite.log").read_text()[-3000:]
    assert stages_of(done) == STAGES
    results = {"products", "layer", "kernels", "model"}
    assert {file.name for file in out.iterdir()} == {
        "summary.txt", "suite.log", "selfcheck.json", *(f"{name}.json" for name in results)
    }  # fmt: skip
    found = rows_of(out, *results)
    assert names_in(found["products"]) == {
        "symm_gram", "symm_square", "gemm3", "matmul", "leading_eigenspaces", "polar_express"
    }  # fmt: skip
    assert {name.partition(":")[0] for name in names_in(found["kernels"])} == ELEMENT_WISE
    assert names_in(found["model"]) == {"merge task_arithmetic", "merge rtsvm products", "merge rtsvm eigen"}
    assert names_in(found["layer"]) == {"tsvm"}
    layer = {(row["provider"], row["options"].get("matrix")) for row in found["layer"] if row["metric"] == "time"}
    for provider in ("eigen", "float32 SVD"):
        assert {(provider, matrix) for matrix in ("tiny", f"tiny{DECAYING}", "one layer")} <= layer
    memory = {row["metric"]: row["median"] for row in found["model"]}
    assert memory["device memory"] is None and memory["memory"] > 0
    verdicts = json.loads((out / "selfcheck.json").read_text())["reports"][0]["verdicts"]
    assert {op for op, found in ops().items() if "cpu" in found.backends} <= verdicts.keys()
    assert all(verdict["passed"] for of_op in verdicts.values() for verdict in of_op.values())


@pytest.mark.slow
@pytest.mark.exhaustive
def test_what_takes_longer(tmp_path):
    """Needs nothing that another call wrote."""
    done = dry_run(tmp_path, 3000, STAGES="tests merges ceilings")
    assert done.returncode == 0, (tmp_path / "suite.log").read_text()[-3000:]
    assert stages_of(done) == ["tests", "merges", "ceilings"]
    found = rows_of(tmp_path, "merges", "ceilings")
    assert {"tsv_merge", "ties"} < {name.partition(":")[0] for name in names_in(found["merges"])}
    assert names_in(found["ceilings"]) == {
        "copy", "matmul", "eigh", "svd", "qr", "topk", "kthvalue", "sort", "tsv_merge as published"
    }  # fmt: skip
    # a CPU makes no GPU figures
    assert not any(row["metric"] in ("rate", "arithmetic") for row in found["ceilings"])


@pytest.mark.slow
def test_one_stage(tmp_path):
    assert stages_of(dry_run(tmp_path, 100, STAGES="info")) == ["info"]


def test_a_call_ends_with_its_budget(tmp_path):
    done = dry_run(tmp_path, 100, STAGES="info merges", BUDGET="5")
    assert done.returncode == 1
    lines = (tmp_path / "summary.txt").read_text().splitlines()
    assert [line.split()[:3] for line in lines] == [["info", "exit", "124"], ["merges", "exit", "124"]]


def test_the_limits_of_a_call_fit_into_nine_minutes():
    script = SCRIPT.read_text()
    (stages,) = re.findall(r"STAGES:-([a-z ]+)\}", script)
    limits = {name: int(seconds) for name, seconds in re.findall(r"\b(?:stage|bench) (\w+) (\d+) ", script)}
    (checked,) = re.findall(r"memcheck \] && echo 240 \|\| echo (\d+)\)", script)
    limits |= dict.fromkeys(("racecheck", "initcheck"), int(checked))
    assert set(stages.split()) <= limits.keys()
    # Built modules are brought along, or else the last stages get less.
    assert sum(limits[name] for name in stages.split() if name != "build") <= 540
    assert limits["build"] <= 180
