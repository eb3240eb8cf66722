"""The examples run and show what they say; the demo has its own tests beside the merges it makes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from r_tsvm_kernels import MergeConfig, merge_checkpoints, verify_output
from r_tsvm_kernels.bench import read_rows

ROOT = Path(__file__).resolve().parents[1]


def run_example(name, *arguments, cwd):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, str(ROOT / "examples" / name), *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_example_is_tested():
    tested = (ROOT / "tests" / "conftest.py").read_text() + Path(__file__).read_text()
    assert all(path.name in tested for path in (ROOT / "examples").glob("*.py"))


def test_small_models_can_be_merged(tmp_path):
    base, *tuned = (tmp_path / name for name in ("base", "math", "code"))
    program = [sys.executable, str(ROOT / "examples" / "small_models.py"), str(base), *map(str, tuned)]
    subprocess.run(program, check=True, capture_output=True, timeout=300)
    result = merge_checkpoints(MergeConfig("tsvm", base_model=base, models=tuned), tmp_path / "merged")
    assert all(report.certificate.met for report in result.reports.values() if report.certificate)
    assert verify_output(result.path, inputs=True).ok


def test_the_demo_writes_its_figures_down(trained):
    whole, *rows = read_rows(trained / "results.json")
    assert whole["options"]["quick"] and whole["metric"] == "time" and whole["median"] > 0
    accuracy = {}
    for row in rows:
        accuracy.setdefault(row["name"], {})[row["options"]["task"]] = row["median"]
    assert all(list(found) == ["rotated", "mirrored", "negative"] for found in accuracy.values())
    assert all(0 <= value <= 100 for found in accuracy.values() for value in found.values())
    assert sum(accuracy["rtsvm"].values()) > sum(accuracy["base"].values())


@pytest.mark.exhaustive
def test_lora_experts(tmp_path, trained):
    shown = run_example("lora_experts.py", "--models", str(trained), "--ranks", "2", "32", cwd=tmp_path)
    rows = re.findall(r"(whole models|rank \d+) .*?(\d+) kB .*?([\d.]+) │$", shown, re.MULTILINE)
    (_, whole, dense), (_, small, low), (_, _, high) = rows
    assert int(small) < int(whole) / 4
    assert float(low) <= float(high) + 3
    assert abs(float(high) - float(dense)) < 10


@pytest.mark.slow
@pytest.mark.exhaustive
def test_sweep_demo(tmp_path):
    shown = run_example("sweep_demo.py", "--quick", cwd=tmp_path)
    rows = dict(re.findall(r"│ (\S.*?) +│ +([\d.]+) │", shown))
    assert float(rows["task_arithmetic, best"]) > float(rows["task_arithmetic, defaults"])
    assert float(rows["tsvm, best"]) > float(rows["base"])


@pytest.mark.exhaustive
def test_kill_and_resume(tmp_path):
    shown = run_example("kill_and_resume.py", "--layers", "4", cwd=tmp_path)
    assert "the same bytes, checksums right" in shown
