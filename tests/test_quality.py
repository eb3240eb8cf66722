"""The quality study runs, continues where it was stopped, and its tables are those of its results."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from r_tsvm_kernels import MergeConfig, merge_state_dicts

ROOT = Path(__file__).resolve().parents[1]
STUDY = ROOT / "benchmarks" / "quality"

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
pytestmark = pytest.mark.slow


def run(program, *arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(STUDY / program), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    out = tmp_path_factory.mktemp("quality")
    done = run("run.py", "--quick", "--suites", "digits", "--seeds", "10", "0", "--workers", "1", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert "digits, seed 10:" in done.stdout and "digits, seed 0:" in done.stdout
    return out


def test_quick_results_are_complete_and_sane(quick):
    seeds = json.loads((quick / "digits.json").read_text())["seeds"]
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


def test_what_is_there_is_not_run_again(quick):
    before = (quick / "digits.json").read_bytes()
    done = run("run.py", "--quick", "--suites", "digits", "--seeds", "0", "10", "--out", str(quick))
    assert (done.returncode, done.stdout) == (0, "")
    assert (quick / "digits.json").read_bytes() == before


def test_results_of_other_settings_are_not_continued(quick, tmp_path):
    results = json.loads((quick / "digits.json").read_text())
    results["settings"]["alphas"] = [1.0]
    (tmp_path / "digits.json").write_text(json.dumps(results))
    done = run("run.py", "--quick", "--suites", "digits", "--seeds", "0", "--out", str(tmp_path))
    assert done.returncode == 1 and "--restart" in done.stderr


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "della", "iso_cts", "tsvm", "rtsvm"])
def test_every_method_is_linear_in_alpha(method, monkeypatch):
    """The study makes each merge once, at alpha 1."""
    monkeypatch.syspath_prepend(STUDY)
    from study import at_alpha

    base = {"matrix": torch.randn(12, 9), "vector": torch.randn(9)}
    experts = [{name: weight + torch.randn_like(weight) for name, weight in base.items()} for _ in range(3)]
    once = merge_state_dicts(base, experts, MergeConfig(method)).state_dict
    exact = merge_state_dicts(base, experts, MergeConfig(method, alpha=0.35)).state_dict
    for name, weight in at_alpha(base, once, 0.35).items():
        torch.testing.assert_close(weight, exact[name], atol=1e-5, rtol=1e-5)


def test_the_tables_are_those_of_the_results():
    done = run("table.py", "--check")
    assert done.returncode == 0, done.stderr
