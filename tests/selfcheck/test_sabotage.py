"""A sabotaged kernel never runs in a merge: the bytes are those of the reference."""

import logging
import sys
from pathlib import Path

import pytest
import simulated_device
import torch
from checkpoints import digest, family

from r_tsvm_kernels import MergeConfig, merge_checkpoints, use_backend
from r_tsvm_kernels.dispatch import chosen, explain
from r_tsvm_kernels.errors import BackendUnavailableError
from r_tsvm_kernels.ops import elect_and_sum
from r_tsvm_kernels.selfcheck import check
from r_tsvm_kernels.verdicts import children

PROGRAM = Path(simulated_device.__file__)

# The op, the sabotage, and what the verdict says.
SABOTAGES = {
    "wrong_bits": ("elect_and_sum", "bytes differ from the reference's"),
    "nan": ("elect_and_sum", "bytes differ from the reference's"),
    "exception": ("elect_and_sum", "RuntimeError: the kernel does not compile"),
    "odd_sizes": ("elect_and_sum", "bytes differ from the reference's"),
    "accepts": ("magnitude_select", "accepted, where NonFiniteError is expected"),
    "changes_inputs": ("elect_and_sum", "it changes its inputs"),
    "crash": ("elect_and_sum", "it crashed its process (SIGSEGV)"),
    "hang": ("elect_and_sum", "it did not end within 6 s"),
}


@pytest.fixture
def merge(tmp_path):
    """A function that merges by TIES and returns the digests of the weights; the weights by the references."""
    paths, _, _ = family(tmp_path / "in")
    base, *tuned = map(str, paths)
    config = MergeConfig("ties", base_model=base, models=tuple({"model": m} for m in tuned), density=0.5)

    def run(name):
        out = merge_checkpoints(config, tmp_path / name, device="cpu", threads=1).path
        return {file: content for file, content in digest(out).items() if file.endswith(".safetensors")}

    with use_backend("torch"):
        reference = run("reference")
    assert reference
    return run, reference


def check_sabotage(name, monkeypatch, caplog, merge):
    op, reason = SABOTAGES[name]
    simulated_device.install(monkeypatch, op, cuda=getattr(simulated_device, name))
    run, reference = merge
    assert run("merged") == reference
    assert chosen(op, "cpu") == "torch"
    assert reason in dict(explain(op, "cpu"))["cuda"]
    told = [record.getMessage() for record in caplog.records if "is not used on" in record.getMessage()]
    assert len(told) == 1 and reason in told[0] and "`rtsvm selfcheck --device cpu` checks again" in told[0]
    with pytest.raises(BackendUnavailableError, match="its self-check failed"), use_backend(**{op: "cuda"}):
        run("by name")


@pytest.mark.parametrize("name", [name for name in SABOTAGES if name not in ("crash", "hang")])
def test_it_is_caught_and_the_reference_merges(name, checks, monkeypatch, caplog, merge):
    caplog.set_level(logging.WARNING, "r_tsvm_kernels")
    check_sabotage(name, monkeypatch, caplog, merge)
    assert len(checks) == 1


@pytest.mark.parametrize("name", ["crash", pytest.param("hang", marks=pytest.mark.exhaustive)])
def test_it_is_caught_in_a_process_of_its_own(name, monkeypatch, caplog, merge):
    monkeypatch.setattr(children, "COMMAND", (sys.executable, str(PROGRAM), SABOTAGES[name][0], name))
    if name == "hang":
        monkeypatch.setattr(children, "STEP_SECONDS", 6.0)
        monkeypatch.setattr(children, "load", lambda: 1.0)
    monkeypatch.setenv("PYTHONPATH", f"{PROGRAM.parents[1]}:{PROGRAM.parent}")
    check_sabotage(name, monkeypatch, caplog, merge)


def test_a_slow_kernel_passes_and_is_not_taken(checks, monkeypatch, merge):
    simulated_device.install(monkeypatch, "elect_and_sum", cuda=simulated_device.slow)
    run, reference = merge
    assert run("merged") == reference
    assert chosen("elect_and_sum", "cpu") == "torch"
    assert dict(explain("elect_and_sum", "cpu")) == {"cuda": "ready", "torch": "ready"}
    with use_backend(elect_and_sum="cuda"):
        assert run("by name") == reference


def test_the_fastest_that_passed_is_taken(checks, monkeypatch):
    calls = []

    def noted(run, *args):
        calls.append(args)
        return run(*args)

    simulated_device.install(monkeypatch, "elect_and_sum", cuda=simulated_device.good, triton=noted)
    monkeypatch.setattr(check, "_times", lambda op, passed, device: {"torch": 3.0, "cuda": 2.0, "triton": 1.0})
    assert chosen("elect_and_sum", "cpu") == "triton"
    calls.clear()
    elect_and_sum(torch.zeros(3), [torch.ones(3)], 1.0)
    assert len(calls) == 1
