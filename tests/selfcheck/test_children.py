"""Processes that check kernels may crash, hang, fail to start, or be stopped because the time is up."""

import subprocess
import sys
import time

import pytest

from r_tsvm_kernels.verdicts import Verdict, children
from r_tsvm_kernels.verdicts.store import PACKAGE

COMMAND = children.COMMAND
# A child whose kernels do what they are called.
CHILD = """
import json, os, signal, sys, time
asked = json.load(sys.stdin)
def say(**line):
    print(json.dumps(line), flush=True)
for op, kernels in asked["kernels"].items():
    for kernel in kernels:
        say(op=op, begins=[kernel])
        if kernel == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if kernel == "exit":
            sys.exit("CUDA error: an illegal memory access was encountered")
        if kernel == "hang":
            time.sleep(100)
        if kernel == "cut":
            os.write(1, b'{"op": "a", "verd')
            os.kill(os.getpid(), signal.SIGABRT)
        if kernel == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if kernel == "memory":
            say(op=op, unchecked=[kernel])
            continue
        say(op=op, verdicts={kernel: {"passed": kernel != "bad", "reason": "no" if kernel == "bad" else ""}})
        if kernel == "poison":
            sys.exit(1)
    if "late" in kernels:
        say(op=op, begins=["late"])
        sys.exit(7)
    say(op=op, begins=kernels)
    say(op=op, seconds={kernel: 1.0 for kernel in ["torch", *kernels] if kernel != "untimed"})
"""
GOOD = Verdict(True, seconds=1.0)


@pytest.fixture(autouse=True)
def child(monkeypatch):
    monkeypatch.setattr(children, "COMMAND", (sys.executable, "-c", CHILD))
    monkeypatch.setattr(children, "STEP_SECONDS", 1.0)
    monkeypatch.setattr(children, "load", lambda: 1.0)


def reasons(found):
    return {f"{op} {name}": verdict.reason for op, own in found.items() for name, verdict in own.items()}


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [
        ("crash", "it crashed its process (SIGSEGV)"),
        ("exit", "it crashed its process (exit code 1, CUDA error: an illegal memory access was encountered)"),
        ("hang", "it did not end within 1 s"),
        ("cut", "it crashed its process (SIGABRT)"),
        ("bad", "no"),
    ],
)
def test_what_a_kernel_does_to_its_process_is_its_verdict_alone(kernel, reason):
    seen = []
    found = children.run_checks("cpu", {"a": ["good", kernel, "other"], "b": ["good"]}, progress=seen.append)
    assert reasons(found)[f"a {kernel}"] == reason
    assert not found["a"][kernel].passed
    assert found["a"]["other"].passed and found["b"]["good"] == GOOD == found["b"]["torch"]
    assert {f"a: {kernel}", "a: other", "b: good"} <= set(seen)


def test_a_kernel_that_fails_when_it_is_timed():
    found = children.run_checks("cpu", {"a": ["late"], "b": ["good"]})
    assert not found["a"]["late"].passed and "exit code 7" in found["a"]["late"].reason
    assert found["b"]["good"] == GOOD


@pytest.mark.exhaustive  # imports torch once more
def test_the_program():
    """It imports what it needs, and what it is asked for."""
    done = subprocess.run(COMMAND, input=b'{"device": "cpu", "kernels": {}}', capture_output=True, cwd=PACKAGE.parent)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_no_memory_is_no_verdict():
    assert children.run_checks("cpu", {"a": ["memory"], "b": ["good"]})["a"].keys() == {"torch"}


def test_no_child_can_start(monkeypatch):
    monkeypatch.setattr(children, "COMMAND", (sys.executable, "-c", "import sys; sys.exit('no device')"))
    start = time.monotonic()
    assert children.run_checks("cpu", {"a": ["good"]}) == {}
    assert time.monotonic() - start < 5


def test_the_time_is_up():
    found = children.run_checks("cpu", {"a": ["good"], "b": ["hang"], "c": ["good"]}, time.monotonic() + 0.5)
    assert found == {"a": {"good": GOOD, "torch": GOOD}}


@pytest.mark.parametrize("kernel", ["killed", "untimed", "poison"])
def test_what_is_no_verdict(kernel):
    """The system killed the child; there was no time, or the child ended, between the check and the timing."""
    found = children.run_checks("cpu", {"b": ["good"], "a": [kernel]})
    assert found["b"] == {"good": GOOD, "torch": GOOD} and kernel not in found.get("a", {})


def test_stopping(monkeypatch):
    """An exception, as of Ctrl-C, ends all children at once."""
    monkeypatch.setattr(children, "_at_once", lambda device: 2)
    monkeypatch.setattr(children, "STEP_SECONDS", 60.0)

    def interrupt(what):
        if what == "a: good":
            raise KeyboardInterrupt

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        children.run_checks("cuda:0", {"a": ["good"], "b": ["hang"]}, progress=interrupt)
    assert time.monotonic() - start < 20


def test_on_a_gpu_several_children_share_the_ops(monkeypatch):
    pids = """
import json, os, sys
asked = json.load(sys.stdin)
assert os.environ["RTSVM_SELFCHECK"] == "off" and asked["device"] == "cuda:0"
for op in asked["kernels"]:
    print(json.dumps({"op": op, "verdicts": {"good": {"passed": False, "reason": str(os.getpid())}}}))
"""
    monkeypatch.setattr(children, "COMMAND", (sys.executable, "-c", pids))
    monkeypatch.setattr(children, "_at_once", lambda device: 3)
    found = children.run_checks("cuda:0", {name: ["good"] for name in "abcde"} | {"f": []})
    assert sorted(found) == list("abcde") and len(set(reasons(found).values())) == 3


@pytest.mark.exhaustive
def test_a_kernel_has_more_time_where_much_else_runs(monkeypatch):
    monkeypatch.setattr(children, "load", lambda: 2.0)
    assert reasons(children.run_checks("cpu", {"a": ["hang"]})) == {"a hang": "it did not end within 2 s"}
    monkeypatch.setattr(children, "load", lambda: 99.0)
    assert reasons(children.run_checks("cpu", {"a": ["hang"]})) == {"a hang": "it did not end within 4 s"}
