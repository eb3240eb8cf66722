"""Properties of every op: it describes itself, and accepts tensors in all forms or refuses them."""

import re
import subprocess
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from tensor_kinds import REFUSED, TAKEN, at_an_odd_address

from r_tsvm_kernels import use_backend
from r_tsvm_kernels.bench import REGISTRY
from r_tsvm_kernels.dispatch import MODULE, ops
from r_tsvm_kernels.ops import Planes
from r_tsvm_kernels.ops._cases import difference, leaves

ROOT = Path(__file__).resolve().parents[2]
EVERY_OP = pytest.mark.parametrize("op", ops().values(), ids=ops())
# Ops on planes check these themselves, and an op that makes a mask takes no tensor.
OF_TENSORS = [
    op for op in ops().values() if op.name not in ("random_mask", "symm_gram", "symm_square", "purify_step", "gemm3")
]
EVERY_OP_OF_TENSORS = pytest.mark.parametrize("op", OF_TENSORS, ids=lambda op: op.name)


def changed(case, change, only=None):
    """Return the case with its tensors changed: those among its arguments and in lists there, or the first alone."""
    count = -1

    def walk(value):
        nonlocal count
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            count += 1
            return change(value) if only in (None, count) else value
        if isinstance(value, list):
            return [walk(item) for item in value]
        return value

    args = tuple(map(walk, case.args))
    options = {name: walk(value) for name, value in case.options.items() if name == "base"}
    return replace(case, args=args, options=case.options | options)


@cache
def matrices(op):
    """Return cases of the op on matrices or vectors with a result."""
    first = {}
    for case in op.cases.cases("cpu"):
        tensors = list(leaves([arg for arg in case.args if isinstance(arg, torch.Tensor | list)]))
        if case.raises is None and tensors and tensors[0].numel() > 1:
            dtypes = tuple(x.dtype for x in tensors)
            first.setdefault((dtypes, tensors[0].ndim), case)
    return list(first.values())[:12]


# --- the folder


@EVERY_OP
def test_a_backend_is_a_module_and_a_module_a_backend(op):
    folder = ROOT / "r_tsvm_kernels" / "ops" / op.name
    modules = {name for name, module in MODULE.items() if (folder / f"{module}.py").is_file()}
    assert modules == set(op.backends)
    assert set(op.order) == {"cpu", "cuda"} and all("torch" in order for order in op.order.values())


@EVERY_OP
def test_it_has_cases_a_test_and_a_benchmark_of_its_name(op):
    assert (ROOT / "tests" / "ops" / f"test_{op.name}.py").is_file()
    assert op.name in {name.partition(":")[0] for name in REGISTRY}
    labels = [case.label for case in op.cases.cases("cpu")]
    assert len(labels) > 10
    own_kernels = bool(op.cases.WIDTHS)
    assert "triton" in op.backends or not own_kernels
    assert any(case.compiled for case in op.cases.cases("cpu")) == own_kernels


def listed(op="<op>"):
    """Return the files that CONTRIBUTING.md lists for a new op."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    section = text[text.index("## Add an op") : text.index("## Add a merge method")]
    here = {"tests/ops/test_every_op.py"}
    return {path.replace("<op>", op) for path in re.findall(r"`([\w./<>]+\.(?:py|cpp|cu|h|md))`", section)} - here


@EVERY_OP
def test_few_files_name_it_for_its_own_sake(op):
    files = {file for file in listed(op.name) if (ROOT / file).is_file()}
    needed = {file for file in files if op.name in file or re.search(rf"\b{op.name}\b", (ROOT / file).read_text())}
    on_cuda = {file for file in needed if "cuda" in file}
    assert len(needed - on_cuda) <= 12, sorted(needed)


def test_no_other_file_lists_the_ops():
    """A file that names most of them would have to be extended for a new one. Generated pages are."""
    kinds = ("py", "md", "cpp", "cu", "h", "txt", "toml", "yml", "sh")
    command = ["git", "ls-files", "Makefile", *(f"*.{kind}" for kind in kinds)]
    files = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    generated = {"docs/api/ops.md", "docs/platforms.md", "docs/speed.md", "docs/tools.md"}
    for file in sorted({*files} - listed() - generated - {"CHANGELOG.md"}):
        if (ROOT / file).is_file():
            words = set(re.findall(r"\w+", (ROOT / file).read_text()))
            assert len(words & ops().keys()) < len(ops()) - 2, file


# --- tensors as callers have them


@pytest.mark.parametrize("backend", [None, "torch"])
@pytest.mark.parametrize("kind", TAKEN)
@EVERY_OP_OF_TENSORS
def test_kinds_of_tensors_that_it_takes(op, kind, backend):
    for case in matrices(op):
        with use_backend(backend):
            want = op(*case.args, **case.options)
            some = changed(case, TAKEN[kind])
            got = op(*some.args, **some.options)
        assert not any(tensor.requires_grad for tensor in leaves(got)), case.label
        assert difference(op, got, want) is None, case.label


@EVERY_OP_OF_TENSORS
def test_cpu_kernels_take_tensors_at_odd_addresses(op):
    """A sanitizer reports the first access that assumes alignment."""
    for case in matrices(op):
        want = op(*case.args, **case.options)
        odd = changed(case, at_an_odd_address)
        assert difference(op, op(*odd.args, **odd.options), want) is None, case.label


@pytest.mark.filterwarnings("ignore:.*prototype.*:UserWarning", "ignore:.*deprecated.*", "ignore:Sparse CSR.*")
@pytest.mark.parametrize(("make", "error", "message"), REFUSED.values(), ids=REFUSED)
@EVERY_OP_OF_TENSORS
def test_kinds_of_tensors_that_it_refuses(op, make, error, message):
    case = next(case for case in matrices(op) if next(leaves(case.args)).ndim == 2)
    bad = changed(case, lambda x: make(x.float()), only=0)
    with pytest.raises(error):
        op(*bad.args, **bad.options)


def test_planes_that_carry_a_graph():
    planes = ops()["split_planes"](torch.nn.Parameter(torch.randn(8, 8)))
    alpha = torch.nn.Parameter(torch.ones(()))
    added = torch.nn.Parameter(torch.ones(8, 8))
    assert isinstance(planes, Planes)
    for result in (ops()["symm_gram"](planes), ops()["gemm3"](planes, planes, alpha, alpha, added)):
        assert not any(tensor.requires_grad for tensor in leaves(result))
