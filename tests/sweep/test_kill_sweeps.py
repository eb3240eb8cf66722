"""kill -9 at any moment, Ctrl-C, and SIGTERM: run again, a sweep finds the same, and runs nothing twice."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from checkpoints import digest
from swept import models, table

# The score depends on every byte of the model. Each evaluation leaves a line; it also takes a little time.
EVALUATE = """
sum=$(cksum < $1/model.safetensors | cut -d ' ' -f 1)
sleep 0.03
echo $sum >> $2
echo $sum
"""


@pytest.mark.parametrize(
    ("kills", "seed", "jobs", "method"),
    [(8, 1, 1, "tsvm"), (6, 2, 3, "ties"), pytest.param(20, 3, 2, "tsvm", marks=pytest.mark.exhaustive)],
)
def test_nothing_is_lost_or_done_twice(tmp_path, kills, seed, jobs, method):
    models(tmp_path / "in")
    (tmp_path / "eval.sh").write_text(EVALUATE)
    program = [sys.executable, str(Path(__file__).with_name("kill_sweeps.py")), tmp_path, kills, seed, jobs, method]
    done = subprocess.run(list(map(str, program)), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["code"] == 0 and sum(own["killed"] for own in found["rounds"]) >= kills
    expected = table(tmp_path / "whole")
    for own in found["rounds"]:
        out = Path(own["out"])
        assert own["code"] == 0, done.stderr
        assert table(out) == expected
        assert digest(out / "best")["model.safetensors"] == digest(tmp_path / "whole" / "best")["model.safetensors"]
        lines = [json.loads(line) for line in (out / "sweep_journal.jsonl").read_text().splitlines()[1:]]
        numbers = [line["trial"]["number"] for line in lines]
        assert sorted(numbers) == list(range(1, 9))  # each is in the journal once
        # An evaluation that a kill has cut off, or not let into the journal, is all that runs again.
        runs = Counter(Path(f"{out}.log").read_text().split())
        assert len(runs) == 8 and sum(runs.values()) <= 8 + jobs * own["killed"]
        assert not (out / "work").exists()


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def until(condition, seconds=90.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(("number", "code", "jobs"), [(signal.SIGINT, 130, 1), (signal.SIGTERM, 143, 2)])
def test_a_stop_ends_evaluations_and_says_how_to_go_on(tmp_path, number, code, jobs):
    config = models(tmp_path / "in")
    script = tmp_path / "eval.sh"
    waits = f'if [ -e {tmp_path}/wait ] && grep -q "alpha: 0.4" $1/merge_recipe.yaml; then echo $$ > {tmp_path}/pid'
    script.write_text(f"{waits}; sleep 600; fi\necho 1\n")
    (tmp_path / "wait").touch()
    (tmp_path / "r.yaml").write_text(config.to_yaml())
    command = [sys.executable, "-m", "r_tsvm_kernels", "sweep", "r.yaml", "out", "--grid", "alpha=0.2:0.4:0.2",
               "--eval", f"sh {script} {{model}}", "--jobs", str(jobs)]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=environment) as process:
        until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().strip())
        journal = tmp_path / "out" / "sweep_journal.jsonl"
        until(lambda: len(journal.read_text().splitlines()) == 2)
        process.send_signal(number)
        err = process.communicate(timeout=60)[1]
    assert process.returncode == code
    assert "rtsvm sweep: stopped; 1 of 2 candidates are done: run the same command again to go on" in err
    pid = int((tmp_path / "pid").read_text())
    until(lambda: not alive(pid), 20)
    (tmp_path / "wait").unlink()
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "2/2 alpha=0.4: score=1" in done.stderr and "1/2" not in done.stderr
