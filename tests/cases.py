"""Compare a backend with the reference on the cases that an op lists."""

import pytest
import torch

from r_tsvm_kernels.ops._cases import difference


def check(op, backend):
    """Run all cases of an op with a backend and with the reference, on the default device; the results must agree."""
    count = 0
    for case in op.cases.cases(torch.get_default_device()):
        if case.raises is not None:
            for which in (backend, "torch"):
                with pytest.raises(case.raises):
                    op(*case.args, **case.options, backend=which)
        else:
            got, expected = (op(*case.args, **case.options, backend=which) for which in (backend, "torch"))
            assert difference(op, got, expected) is None, case.label
        count += 1
    assert count > 20
