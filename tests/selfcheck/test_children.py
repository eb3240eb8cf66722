"""Processes that check kernels may crash, hang, fail to start, or be stopped because the time is up."""

import os
import sys
import time

import pytest

from r_tsvm_kernels.verdicts import Verdict, children

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
    say(op=op, seconds={kernel: 1.0 for kernel in ["torch", *kernels] if kernel == "good" or kernel == "torch"})
"""
GOOD = Verdict(True, seconds=1.0)


@pytest.fixture(autouse=True)
def child(monkeypatch):
    monkeypatch.setattr(children, "COMMAND", (sys.executable, "-c", CHILD))
    monkeypatch.setattr(children, "STEP_SECONDS", 1.0)


def reasons(found):
    return {f"{op} {name}": verdict.reason for op, own in found.items() for name, verdict in own.items()}


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [
        ("crash", "it crashed its process (SIGSEGV)"),
        ("exit", "it crashed its process (exit code 1, CUDA error: an illegal memory access was encountered)"),
        ("hang", "it did not end within 1 s"),
        ("cut", "it crashed its process (SIGKILL)"),
        ("bad", "no"),
        ("poison", ""),  # only what comes after it would fail
    ],
)
def test_what_a_kernel_does_to_its_process_is_its_verdict_alone(kernel, reason):
    seen = []
    found = children.run_checks("cpu", {"a": ["good", kernel, "other"], "b": ["good"]}, progress=seen.append)
    assert reasons(found)[f"a {kernel}"] == reason
    assert found["a"][kernel].passed == (kernel == "poison")
    assert found["a"]["other"].passed and found["b"]["good"] == GOOD == found["b"]["torch"]
    assert {f"a: {kernel}", "a: other", "b: good"} <= set(seen)


def test_a_kernel_that_fails_when_it_is_timed():
    found = children.run_checks("cpu", {"a": ["late"], "b": ["good"]})
    assert not found["a"]["late"].passed and "exit code 7" in found["a"]["late"].reason
    assert found["b"]["good"] == GOOD


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


def test_on_a_gpu_several_children_share_the_ops(monkeypatch):
    pids = """
import json, os, sys
asked = json.load(sys.stdin)
assert os.environ["RTSVM_SELFCHECK"] == "off" and asked["device"] == "cuda:0"
for op in asked["kernels"]:
    print(json.dumps({"op": op, "verdicts": {"good": {"passed": True, "reason": str(os.getpid())}}}))
"""
    monkeypatch.setattr(children, "COMMAND", (sys.executable, "-c", pids))
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    found = children.run_checks("cuda:0", {name: ["good"] for name in "abcde"} | {"f": []})
    assert sorted(found) == list("abcde") and len(set(reasons(found).values())) == 3
