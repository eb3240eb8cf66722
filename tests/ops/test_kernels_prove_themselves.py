"""The self-check passes our kernels, in Triton's interpreter and in the emulator of CUDA."""

import pytest
import torch
from variants import some_backends

from r_tsvm_kernels.dispatch import ops
from r_tsvm_kernels.selfcheck import check
from r_tsvm_kernels.selfcheck.hard_cases import features, hard_cases

QUICK = ("add_update", "magnitude_ranks", "symm_square")
WAYS = [
    (op, way)
    for op in ops().values()
    for way in (["triton interpreted"] * ("triton" in op.backends) + ["cuda forward"] * ("cuda" in op.backends))
]


def by_way(*names):
    marks = [some_backends(op, way).args[1][0] for op, way in WAYS if (op.name in names) is bool(names)]
    return pytest.mark.parametrize("backend", marks, indirect=True)


def check_passes(op, backend, monkeypatch):
    monkeypatch.setattr(check, "REALISTIC", {"cpu": (16, 24)})
    monkeypatch.setattr(check, "ODD", (13, 17))
    lines = list(check.check_op(op.name, [backend], torch.device("cpu")))
    (verdict,) = [line["verdicts"][backend] for line in lines if "verdicts" in line]
    assert verdict["passed"], verdict["reason"]
    assert verdict["cases"] >= 8 and lines[-1]["seconds"].keys() == {"torch", backend}
