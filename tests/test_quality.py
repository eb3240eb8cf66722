"""The quality study runs, continues where it was stopped, and its tables are those of its results."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.quality.records import records_of, rows_of
from benchmarks.quality.study import at_alpha
from r_tsvm_kernels import MergeConfig, merge_state_dicts
from r_tsvm_kernels.bench import read_rows, write_rows

ROOT = Path(__file__).resolve().parents[1]

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
pytestmark = [pytest.mark.slow, pytest.mark.exhaustive]


def run(program, *arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", f"benchmarks.quality.{program}", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    out = tmp_path_factory.mktemp("quality")
    done = run("run", "--quick", "--suites", "digits", "--seeds", "10", "0", "--workers", "1", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert "digits, seed 10:" in done.stdout and "digits, seed 0:" in done.stdout
    return out


def test_quick_results_are_complete_and_sane(quick):
    seeds = records_of(read_rows(quick / "digits.json"))
    assert list(seeds) == ["0", "10"]
    choice, held_out = seeds["0"], seeds["10"]
    assert list(choice["methods"]) == ["tsvm"] and len(choice["rtsvm"]) >= 3
    assert len(held_out["methods"]) == 14 and "start" in held_out["rtsvm"]
    experts = [expert["accuracy"][task] for task, expert in enumerate(held_out["experts"])]
    assert min(experts) > max(held_out["base"]["accuracy"])  # they have learned something
    for entry in (*held_out["methods"].values(), *held_out["rtsvm"].values()):
        assert sum(entry["tuned"]["validation"]) >= sum(entry["default"]["validation"])
        assert all(0 <= value <= 100 for value in entry["default"]["accuracy"] + entry["tuned"]["accuracy"])
    assert "accuracy" not in choice["rtsvm"]["start"]["default"]  # nothing is tested where defaults are chosen


def test_records_are_the_same_from_rows(quick):
    records = records_of(read_rows(quick / "digits.json"))
    rows = [row for seed, record in records.items() for row in rows_of(int(seed), record)]
    assert records_of(rows) == records


def test_what_is_there_is_not_run_again(quick):
    before = (quick / "digits.json").read_bytes()
    done = run("run", "--quick", "--suites", "digits", "--seeds", "0", "10", "--out", str(quick))
    assert (done.returncode, done.stdout) == (0, "")
    assert (quick / "digits.json").read_bytes() == before


def test_results_of_other_settings_are_not_continued(quick, tmp_path):
    rows = read_rows(quick / "digits.json")
    rows[0]["notes"]["alphas"] = [1.0]
    write_rows(tmp_path / "digits.json", rows)
    done = run("run", "--quick", "--suites", "digits", "--seeds", "0", "--out", str(tmp_path))
    assert done.returncode == 1 and "--restart" in done.stderr


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "della", "iso_cts", "tsvm", "rtsvm"])
def test_every_method_is_linear_in_alpha(method):
    """The study makes each merge once, at alpha 1."""
    base = {"matrix": torch.randn(12, 9), "vector": torch.randn(9)}
    experts = [{name: weight + torch.randn_like(weight) for name, weight in base.items()} for _ in range(3)]
    once = merge_state_dicts(base, experts, MergeConfig(method)).state_dict
    exact = merge_state_dicts(base, experts, MergeConfig(method, alpha=0.35)).state_dict
    for name, weight in at_alpha(base, once, 0.35).items():
        torch.testing.assert_close(weight, exact[name], atol=1e-5, rtol=1e-5)


def test_the_tables_are_those_of_the_results():
    done = run("table", "--check")
    assert done.returncode == 0, done.stderr
