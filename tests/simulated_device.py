"""A device whose kernels must pass a self-check, on CPU tensors: the reference, sabotaged, stands in for a kernel.

As a program, simulated_device.py OP SABOTAGE, it is the child in which kernels are checked.
"""

import os
import signal
import sys
import time

import pytest
import torch

from r_tsvm_kernels import backends, dispatch, verdicts
from r_tsvm_kernels.dispatch import MODULE
from r_tsvm_kernels.ops._cases import leaves
from r_tsvm_kernels.selfcheck import check
from r_tsvm_kernels.verdicts import children


def wrong_bits(run, *args):
    result = run(*args)
    for x in leaves(result):
        if x.numel():
            x.view(-1)[0] = torch.nextafter(x.view(-1)[0], torch.full((), 99.0, dtype=x.dtype))
    return result


def nan(run, *args):
    result = run(*args)
    for x in leaves(result):
        x.view(-1)[-1:] = float("nan")
    return result


def exception(run, *args):
    raise RuntimeError("the kernel does not compile\nlong listing")


def odd_sizes(run, *args):
    result = run(*args)
    for x in leaves(result):
        if x.numel() > 20 and x.numel() % 2:
            x.view(-1)[-1] += 1
    return result


def accepts(run, *args):
    return run(*(arg.nan_to_num() if isinstance(arg, torch.Tensor) else arg for arg in args))


def changes_inputs(run, base, tuned, *args):
    result = run(base, tuned, *args)
    tuned[0].zero_()
    return result


def slow(run, *args):
    time.sleep(0.003)
    return run(*args)


def crash(run, *args):
    os.kill(os.getpid(), signal.SIGSEGV)


def hang(run, *args):
    time.sleep(1000)


def good(run, *args):
    return run(*args)


def install(monkeypatch, op, **kernels):
    """Make the CPU a device of which only `op` has kernels: the reference, changed by these functions, by backend."""
    if "triton" in kernels:
        pytest.importorskip("triton", reason="a Triton kernel is replaced, and its module needs triton")
    monkeypatch.setattr(verdicts, "CHECKED", frozenset({"cpu"}))
    state = backends.state
    monkeypatch.setattr(backends, "state", lambda name: backends.READY if name in kernels else state(name))
    for each in dispatch.ops().values():
        monkeypatch.setitem(each.order, "cpu", ("torch",))
    found = dispatch.ops()[op]
    monkeypatch.setitem(found.order, "cpu", (*kernels, "torch"))
    for backend, change in kernels.items():
        module = getattr(found, MODULE[backend])

        def run(*args, change=change):
            return change(found.reference.run, *args)

        run.__module__ = module.__name__
        monkeypatch.setattr(module, "run", run)
    monkeypatch.setattr(check, "REALISTIC", {"cpu": (32, 24)})
    monkeypatch.setattr(check, "ODD", (17, 9))


def run_here(device, kernels, deadline=None, progress=None):
    """Check kernels in this process: takes the place of `children.run_checks`."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RTSVM_SELFCHECK", "off")
        for op, names in kernels.items():
            for line in check.check_op(op, names, torch.device(device)):
                children._note(line, found, {})
    return found


if __name__ == "__main__":
    from r_tsvm_kernels.selfcheck.__main__ import main

    with pytest.MonkeyPatch.context() as changes:
        install(changes, sys.argv[1], cuda=globals()[sys.argv[2]])
        main()
