"""Commands that evaluate: how they are written, run, and stopped."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from r_tsvm_kernels import ConfigError, OutputBusyError
from r_tsvm_kernels.sweep import commands
from r_tsvm_kernels.sweep.commands import end_orphan, evaluation_command, filled
from r_tsvm_kernels.sweep.evaluation import make_evaluation

MODEL = Path("/a b/it's $HOME")


def result(command, tmp_path, timeout=None, model=MODEL):
    slot = tmp_path / "slot"
    slot.mkdir(exist_ok=True)
    return make_evaluation(command, timeout)(model, slot)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("echo {model} 'a b' \"c;d\"", ["echo", str(MODEL), "a b", "c;d"]),
        ("echo --m={model}/x {\"q\": 1}", ["echo", f"--m={MODEL}/x", "{q:", "1}"]),
        ("echo '$HOME|' a\\;b {model}", ["echo", "$HOME|", "a;b", str(MODEL)]),
        ("echo '{model}'", ["echo", str(MODEL)]),
    ],
)  # fmt: skip
def test_words_without_a_shell(text, words):
    assert filled(evaluation_command(text), MODEL) == words


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("printf %s {model} | tail -c 5", "$HOME"),
        ("X=1 sh -c 'echo $X' > /dev/null; printf %s {model}", str(MODEL)),
        ('A=b; printf "%s" "$A" {model}', f"b{MODEL}"),
        ("printf %s `printf %s x` {model}", f"x{MODEL}"),
        ("LC_ALL=C printf %s {model}", str(MODEL)),
    ],
)
def test_a_shell_where_it_is_needed(text, shown):
    command = evaluation_command(text)
    assert command[:2] == ["/bin/sh", "-c"]
    assert subprocess.run(filled(command, MODEL), capture_output=True, text=True, check=True).stdout == shown


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("python evaluate.py", "a command with {model} in it"),
        ("echo '{model}", "cannot be read: No closing quotation"),
        ("no-such-program {model}", "no such program: no-such-program"),
        ("echo '{model}' | tail -n 1", "write {model} outside quotes"),
        ("no.such.module:f", "cannot be imported: ModuleNotFoundError: No module named 'no'"),
        ("json:f", "AttributeError: module 'json' has no attribute 'f'"),
        ("json:__name__", "TypeError: json:__name__ is no function"),
        ("missing.py:f", "FileNotFoundError"),
    ],
)
def test_commands_that_cannot_run(text, message):
    with pytest.raises(ConfigError) as caught:
        make_evaluation(text, None)
    assert message in str(caught.value)
    with pytest.raises(ConfigError, match="a command or a function, got int"):
        make_evaluation(1, None)
    with pytest.raises(ConfigError, match="a function cannot be stopped"):
        make_evaluation(len, 5.0)


def test_scores_and_failures(tmp_path):
    assert result("echo 0.25 {model}x | cut -c 1-4", tmp_path).scores == {"score": 0.25}
    found = result("sh -c 'echo 1; echo sad >&2; exit 3' {model}", tmp_path)
    assert (found.scores, found.failure, found.exit_status, found.stderr) == ({}, "exit status 3", 3, "sad")
    found = result("sh -c 'kill -9 $$' {model}", tmp_path)
    assert (found.failure, found.exit_status) == ("ended by signal 9", -9)
    found = result("sh -c 'echo hello; echo why >&2' {model}", tmp_path)
    assert "got 'hello'" in found.failure and (found.exit_status, found.stderr) == (0, "why")
    long = result("sh -c 'seq 100000 >&2; seq 1000000' {model}", tmp_path)
    assert long.scores == {"score": 1e6}
    long = result("sh -c 'seq 100000 >&2; exit 1' {model}", tmp_path)
    assert long.stderr.splitlines()[-1] == "100000" and len(long.stderr.splitlines()) == 20


FUNCTIONS = """
import sibling
def f(path):
    print('x', end='')
    return {'a': len(str(path))}
def bad(path):
    raise ValueError(path)
"""


def test_functions(tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text(FUNCTIONS)
    (tmp_path / "sibling.py").touch()
    monkeypatch.chdir(tmp_path)
    for name in ("own:f", "own.py:f", f"{tmp_path}/own.py:f"):
        assert result(name, tmp_path).scores == {"a": len(str(MODEL))}
    found = result("own:bad", tmp_path)
    assert found.exit_status == 1
    assert found.stderr.endswith(f"ValueError: {MODEL}")
    (tmp_path / "odd.py").write_text("from fractions import Fraction\ndef f(path):\n    return {'a': Fraction(1, 2)}\n"
                                     "def none(path): pass\n")  # fmt: skip
    assert result("odd:f", tmp_path).scores == {"a": 0.5} and "got 'null'" in result("odd:none", tmp_path).failure
    assert result(lambda path: 1 / len(path.name), tmp_path).scores == {"score": 1 / len(MODEL.name)}
    found = result(lambda path: 1 / 0, tmp_path)
    assert found.failure == "ZeroDivisionError: division by zero" and "Traceback" in found.stderr
    assert "'score' is no number" in result(lambda path: None, tmp_path).failure


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone(pid):
    deadline = time.monotonic() + 20
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not alive(pid)


@pytest.mark.parametrize("trap", ["", "trap '' TERM; "], ids=["polite", "stubborn"])
def test_a_time_limit_ends_all_processes(tmp_path, monkeypatch, trap):
    monkeypatch.setattr(commands, "GRACE_SECONDS", 0.3)
    script = tmp_path / "slow.sh"
    script.write_text(f"{trap}sleep 600 & echo $! > {tmp_path}/child; echo late >&2; wait; wait; sleep 600\n")
    found = result(f"sh {script} {{model}}", tmp_path, timeout=0.5)
    assert found.failure == "took longer than 0.5 s and was stopped" and found.stderr == "late"
    assert 0.4 < found.seconds < 30 and found.exit_status is None
    assert gone(int((tmp_path / "child").read_text()))


def test_what_a_killed_sweep_left_running_is_ended(tmp_path):
    slot = tmp_path / "slot"
    slot.mkdir()
    end_orphan(slot)  # nothing was left
    end_orphan(tmp_path / "none")
    code = (
        "import sys, os; from pathlib import Path; from r_tsvm_kernels.sweep.evaluation import make_evaluation\n"
        f"make_evaluation('sh -c \"sleep 600; true\" {{model}}', None)(Path('m'), Path({str(slot)!r}))"
    )
    with subprocess.Popen([sys.executable, "-c", code]) as sweep:
        deadline = time.monotonic() + 60
        while not ((slot / "group").exists() and (slot / "group").read_text()) and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(sweep.pid, signal.SIGKILL)
    group = int((slot / "group").read_text())
    assert alive(group)
    end_orphan(slot)
    assert gone(group)
    end_orphan(slot)


def test_an_orphan_that_cannot_be_ended_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(commands, "GRACE_SECONDS", 0.2)
    slot = tmp_path / "slot"
    slot.mkdir()
    with commands._locked(slot), pytest.raises(OutputBusyError, match="still runs; stop it"):
        end_orphan(slot)
