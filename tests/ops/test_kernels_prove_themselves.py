"""The self-check passes our kernels in Triton's interpreter and in the emulator of CUDA, and chooses few hard cases."""

import pytest
import torch
from variants import ways_to_run

from r_tsvm_kernels import backends
from r_tsvm_kernels.dispatch import ops
from r_tsvm_kernels.selfcheck import check
from r_tsvm_kernels.selfcheck.hard_cases import features, hard_cases

EVERY_OP = pytest.mark.parametrize("op", ops().values(), ids=ops())
SLOW = ("reweight_prune", "ranked_mask", "elect_and_sum", "magnitude_ranks")


def ways():
    for op in ops().values():
        for name, where in (("triton", "interpreted"), ("cuda", "forward")):
            if name in op.backends:
                way = ways_to_run(op, f"{name} {where}")[0]
                slow = where == "interpreted" and op.name in SLOW
                marks = [*way.marks, pytest.mark.exhaustive] if slow else way.marks
                yield pytest.param(op, *way.values, id=f"{op.name} {way.id}", marks=marks)


@pytest.mark.parametrize(("op", "backend"), [*ways()], indirect=["backend"])
def test_a_kernel_passes(op, backend, monkeypatch):
    state = backends.state
    monkeypatch.setattr(backends, "state", lambda name: backends.READY if name == backend else state(name))
    monkeypatch.setitem(op.order, "cpu", (backend, "torch"))
    monkeypatch.setattr(check, "REALISTIC", {"cpu": (16, 24)})
    monkeypatch.setattr(check, "ODD", (13, 17))
    lines = list(check.check_op(op.name, [backend], torch.device("cpu")))
    (verdict,) = [line["verdicts"][backend] for line in lines if "verdicts" in line]
    assert verdict["passed"], verdict["reason"]
    assert verdict["cases"] >= 8 and lines[-1]["seconds"].keys() == {"torch", backend}


@EVERY_OP
def test_few_cases_have_everything_that_is_hard(op):
    every = list(op.cases.cases("cpu"))
    few = hard_cases(every)
    assert len(few) <= 45 and set(map(id, few)) <= set(map(id, every))
    found = set().union(*map(features, few))
    assert found == set().union(*map(features, every))
    if op.name != "random_mask":  # which takes no tensor
        assert {("odd sides", True), ("odd sides", False), ("size", "a multiple of 16")} <= found
        assert any(case.raises for case in few) or {"NaN", "infinity"} <= found
