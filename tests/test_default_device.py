"""Results stay on the device of the inputs, whatever torch's default device is."""

import pytest
import torch
from checkpoints import digest, family
from compare import same_bits
from merging import group, tasks_of

from r_tsvm_kernels import MergeConfig, merge_checkpoints, merge_tensors
from r_tsvm_kernels.dispatch import ops
from r_tsvm_kernels.engine.verify import verify_output
from r_tsvm_kernels.linalg import Factored, polar, truncated_svd, tsv_merge
from r_tsvm_kernels.methods import METHODS
from r_tsvm_kernels.ops._cases import difference


@pytest.fixture(params=["torch", "cpu"])
def backend(request):
    return request.param


@pytest.mark.parametrize("op", ops().values(), ids=ops())
def test_ops(op, backend):
    if backend not in ("torch", *op.backends):
        pytest.skip(f"{op.name} has no {backend} backend")
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
