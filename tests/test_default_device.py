"""Results stay on the device of the inputs, whatever torch's default device is."""

import ast
from pathlib import Path

import pytest
import torch
from checkpoints import digest, family
from compare import same_bits
from merging import group, tasks_of

import r_tsvm_kernels
from r_tsvm_kernels import MergeConfig, merge_checkpoints, merge_tensors
from r_tsvm_kernels.dispatch import ops
from r_tsvm_kernels.engine.verify import verify_output
from r_tsvm_kernels.linalg import Factored, polar, truncated_svd, tsv_merge
from r_tsvm_kernels.methods import METHODS
from r_tsvm_kernels.ops._cases import difference

PACKAGE = Path(r_tsvm_kernels.__file__).parent
# Functions of torch that make a tensor on the default device, unless they are given one.
FACTORIES = {
    "arange", "as_tensor", "asarray", "empty", "eye", "full", "linspace", "logspace", "ones", "rand", "randint",
    "randn", "randperm", "scalar_tensor", "tensor", "tril_indices", "triu_indices", "zeros",
}  # fmt: skip
ON_THE_CPU = [(op, name) for op in ops().values() for name in ("torch", "cpu") if name in ("torch", *op.backends)]


def test_every_new_tensor_is_given_its_device():
    without = []
    for path in PACKAGE.rglob("*.py"):
        if "bench" in path.relative_to(PACKAGE).parts:  # makes its own inputs on torch's default device
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in FACTORIES:
                owner = node.func.value
                made_by_torch = isinstance(owner, ast.Name) and owner.id == "torch"
                if made_by_torch and "device" not in {keyword.arg for keyword in node.keywords}:
                    without.append(f"{path.relative_to(PACKAGE)}:{node.lineno}: torch.{node.func.attr}")
    assert without == []


@pytest.mark.parametrize(("op", "backend"), ON_THE_CPU, ids=lambda value: getattr(value, "name", value))
def test_ops(op, backend):
    cases = [case for case in op.cases.cases("cpu") if case.raises is None][::9]
    for case in cases:
        # A mask is made where it is asked for: without `device`, that is torch's default.
        options = case.options | ({"device": "cpu"} if op.name == "random_mask" else {})
        want = op(*case.args, **options, backend=backend)
        with torch.device("meta"):
            got = op(*case.args, **options, backend=backend)
        assert difference(op, got, want) is None, case.label


@pytest.mark.parametrize("method", sorted(METHODS))
def test_methods(method):
    base, tuned = group((40, 30), tasks_of(method, 3))
    want = merge_tensors(base, tuned, method)
    with torch.device("meta"):
        got = merge_tensors(base, tuned, method)
    assert same_bits(got.weight, want.weight)


def test_decompositions():
    A, B = torch.randn(2, 50, 40)
    factored = [Factored(torch.randn(50, 4), torch.randn(4, 40)) for _ in range(2)]
    calls = [
        lambda: [truncated_svd(A, 5).S],
        lambda: [polar(A).matrix],
        lambda: [tsv_merge([A, B], [20, 20]).matrix],
        lambda: [tsv_merge([A, B], [20, 20], solver="products").matrix],
        lambda: [tsv_merge(factored, [4, 4]).matrix],
    ]
    for call in calls:
        want = call()
        with torch.device("meta"):
            got = call()
        assert all(map(same_bits, got, want))


@pytest.mark.parametrize("method", ["tsvm", "ties", "model_stock"])
def test_checkpoints(tmp_path, method):
    (base, *tuned), _, _ = family(tmp_path / "in")
    config = MergeConfig(method, base_model=str(base), models=[{"model": str(path)} for path in tuned])
    want = merge_checkpoints(config, tmp_path / "want")
    with torch.device("meta"):
        got = merge_checkpoints(config, tmp_path / "got")
        assert verify_output(got.path, inputs=True).ok
    assert digest(got.path)["model.safetensors"] == digest(want.path)["model.safetensors"]
