"""Compare a backend with the reference on the cases that an op lists."""

from functools import cache

import pytest
import torch

from r_tsvm_kernels.ops._cases import difference


@cache
def expectations(op, device):
    """Return the cases of an op on a device, each with the result of the reference or None where it must raise."""
    found = []
    for case in op.cases.cases(device):
        if case.raises is None:
            found.append((case, op(*case.args, **case.options, backend="torch")))
        else:
            with pytest.raises(case.raises):
                op(*case.args, **case.options, backend="torch")
            found.append((case, None))
    assert len(found) > 20
    return found


def check(op, backend):
    """Run all cases of an op with a backend, on the default device; the results must agree with the reference's."""
    for case, expected in expectations(op, torch.get_default_device()):
        if case.raises is not None:
            with pytest.raises(case.raises):
                op(*case.args, **case.options, backend=backend)
        else:
            got = op(*case.args, **case.options, backend=backend)
            assert difference(op, got, expected) is None, case.label


def check_on_another_stream(op, backend, run):
    """Compare ``run(base, x, backend)`` with the reference where a GPU makes the inputs late, on a stream of its own.

    Nothing but the order on that stream makes the kernels wait for them.
    """
    wide, tuned = torch.randn(2, 300, 1030).bfloat16().unbind()

    def inputs():
        return [(2 * tensor)[:, ::2].mT for tensor in (wide, tuned)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        got = run(*inputs(), backend)
    stream.synchronize()
    assert difference(op, got, run(*inputs(), "torch")) is None
