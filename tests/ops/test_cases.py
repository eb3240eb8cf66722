"""Every backend of every op on the cases that the op lists, against the reference on the same device."""

import pytest
import torch
from variants import every_backend

from r_tsvm_kernels.dispatch import ops
from r_tsvm_kernels.ops._cases import difference


def check(op, backend):
    """Compare a backend with the reference on all cases of the op."""
    device, count = torch.get_default_device(), 0
    for case in op.cases.cases(device):
        if case.raises is not None:
            for which in (backend, "torch"):
                with pytest.raises(case.raises):
                    op(*case.args, **case.options, backend=which)
        else:
            got, expected = (op(*case.args, **case.options, backend=which) for which in (backend, "torch"))
            assert difference(op, got, expected) is None, case.label
        count += 1
    assert count > 20


class TestTaskSpread:
    @every_backend(ops()["task_spread"], reference=False)
    def test_cases(self, backend):
        check(ops()["task_spread"], backend)
