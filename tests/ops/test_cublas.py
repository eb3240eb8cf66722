"""Products by cuBLAS: what is passed to it, and memory that nobody wrote."""

import math

import pytest
import simulated_cublas
import torch

from r_tsvm_kernels import backends, dispatch
from r_tsvm_kernels.ops import _cublas, gemm3, purify_step, split_planes, symm_gram, symm_square
from r_tsvm_kernels.ops._planes import LOW, product


@pytest.fixture
def calls(monkeypatch):
    """What is multiplied: shapes, beta and alpha of each call."""
    found = []

    def add(total, left, right, *, beta=1.0, alpha):
        assert total.dtype == torch.float32 and left.dtype == right.dtype == torch.float16
        found.append((tuple(left.shape), tuple(right.shape), beta, alpha))
        simulated_cublas.add(total, left, right, beta=beta, alpha=alpha)

    simulated_cublas.install(monkeypatch)
    monkeypatch.setattr(_cublas, "_add", add)
    return found


def test_sums_on_tensor_cores_are_short(calls):
    A, B = split_planes(torch.randn(2, 3, 1100)), split_planes(torch.randn(2, 1100, 4))
    got = _cublas.product(A, B)
    torch.testing.assert_close(got, product(A, B), rtol=1e-6, atol=1e-5)
    assert calls == [
        ((2, 3, 512), (2, 512, 4), 0.0, 1.0), ((2, 3, 512), (2, 512, 4), 1.0, 1.0), ((2, 3, 76), (2, 76, 4), 1.0, 1.0),
        ((2, 3, 1100), (2, 1100, 4), 1.0, 1 / LOW), ((2, 3, 1100), (2, 1100, 4), 1.0, 1 / LOW),
    ]  # fmt: skip


@pytest.mark.parametrize("low", [True, False])
def test_symmetric_products_take_one_product_less(calls, low):
    planes = split_planes(torch.randn(2, 7, 600), low=low)
    got = _cublas.symmetric_product(planes, planes.mT)
    assert torch.equal(got, got.mT) and len(calls) == 2 + low
    torch.testing.assert_close(got, product(planes, planes.mT), rtol=1e-6, atol=1e-4)


def test_no_inner_dimension(calls):
    A, B = split_planes(torch.zeros(2, 3, 0)), split_planes(torch.zeros(2, 0, 4))
    assert torch.equal(gemm3(A, B, backend="cublas"), torch.zeros(2, 3, 4))


@pytest.mark.parametrize("op", [gemm3, symm_gram, symm_square, purify_step], ids=lambda op: op.name)
def test_where_it_can_run(op, monkeypatch):
    assert "cublas" in op.order["cuda"] and "cublas" not in op.order["cpu"]
    assert dict(dispatch.explain(op.name, "cuda"))["cublas"] == backends.state("cublas")
    monkeypatch.setattr(torch.ops.aten.baddbmm, "overloads", lambda: ["default", "out"])
    assert "2.8 or newer" in backends.state.__wrapped__("cublas")


@pytest.mark.skipif("too old" in backends.state("cublas"), reason="torch is older than 2.8, which has the product")
def test_torch_has_the_product_that_is_called():
    """The overload exists, and takes these arguments: without a GPU torch says only that there is none."""
    names = {argument.name for argument in torch.ops.aten.baddbmm.dtype_out._schema.arguments}
    assert {"self", "batch1", "batch2", "out_dtype", "beta", "alpha", "out"} <= names
    if torch.cuda.is_available():
        return
    total, half = torch.full((1, 2, 2), math.nan), torch.ones(1, 2, 2, dtype=torch.float16)
    with pytest.raises(NotImplementedError, match="CPU"):
        _cublas._add(total, half, half, beta=0.0, alpha=1.0)
