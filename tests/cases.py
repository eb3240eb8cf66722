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
