"""The Triton products on a GPU: sizes of real models, and the one thing the interpreter cannot show.

Tensor cores add with rounding towards zero. With positive operands all those errors have one sign and would grow with
K; the kernels promote their sums, so the bias must stay at float32's level.
"""

import pytest
import torch
from compare import relative_error

from r_tsvm_kernels import dispatch
from r_tsvm_kernels.linalg.products.merge import products_tsv_merge
from r_tsvm_kernels.ops import gemm3, split_planes, symm_gram, symm_square

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="runs kernels on a GPU: needs a CUDA device"),
]

TRITON = dict.fromkeys(("split_planes", "symm_gram", "symm_square", "gemm3"), "triton")


@pytest.fixture(params=["normal", "positive"])
def draw(request):
    function = torch.randn if request.param == "normal" else torch.rand
    return lambda *shape: function(*shape, device="cuda")


@pytest.mark.parametrize(("low", "allowed"), [(True, 1.5e-6), (False, 1e-3)], ids=["x3", "x1"])
@pytest.mark.parametrize(("m", "n"), [(4096, 1024), (1000, 777), (14336, 512)])
def test_gram(draw, m, n, low, allowed):
    x = draw(2, m, n)
    got = symm_gram(split_planes(x, low=low, backend="triton"), backend="triton")
    exact = x.double().mT @ x.double()
    assert relative_error(got.matrix.cpu(), exact.cpu()) < allowed
    assert torch.equal(got.matrix, got.matrix.mT)
    assert relative_error(got.trace.cpu(), exact.diagonal(dim1=-2, dim2=-1).sum(-1).cpu()) < allowed


@pytest.mark.parametrize(("low", "allowed"), [(True, 1.5e-6), (False, 1e-3)], ids=["x3", "x1"])
@pytest.mark.parametrize("n", [1024, 1365, 4096])
def test_square(draw, n, low, allowed):
    x = draw(n, n)
    x = (x + x.mT) / (2 * n)
    got = symm_square(split_planes(x, low=low, backend="triton"), 2.0, -1.0, backend="triton")
    exact = 2 * x.double() - x.double() @ x.double()
    assert relative_error(got.matrix.dense().cpu(), exact.cpu()) < allowed
    assert torch.equal(got.matrix.hi, got.matrix.hi.mT)


@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16, "planes"], ids=str)
def test_gemm(draw, out):
    A, B, C = draw(2, 1000, 4096), draw(2, 777, 4096) / 4096, draw(2, 1000, 777).bfloat16()
    a, b = (split_planes(x, backend="triton") for x in (A, B))
    got = gemm3(a, b.mT, 0.5, 1.0, C, out=out, backend="triton")
    exact = 0.5 * A.double() @ B.double().mT + C.double()
    dense = got.dense() if out == "planes" else got
    assert relative_error(dense.cpu(), exact.cpu()) < (2.0**-8 if out == torch.bfloat16 else 1.5e-6)


@pytest.mark.xdist_group("large")
def test_results_with_more_elements_than_a_32_bit_index_counts():
    x = torch.randn(2, 16, 33_000, device="cuda")
    got = symm_gram(split_planes(x, backend="triton"), backend="triton").matrix
    last = x[1, :, -100:].double()
    assert relative_error(got[1, -100:, -100:].cpu(), (last.mT @ last).cpu()) < 1.5e-6
    assert torch.equal(got[1, -100:, :100], got[1, :100, -100:].mT)
    del got
    A, B = torch.randn(40_000, 16, device="cuda"), torch.randn(16, 60_000, device="cuda")
    got = gemm3(*(split_planes(y, backend="triton") for y in (A, B)), out=torch.float16, backend="triton")
    exact = A[-100:].double() @ B[:, -100:].double()
    assert relative_error(got[-100:, -100:].cpu(), exact.cpu()) < 2.0**-11


def test_a_step_is_the_same_in_a_cuda_graph():
    x = torch.randn(3, 512, 512, device="cuda")
    planes = split_planes((x + x.mT) / 128, backend="triton")
    done = torch.tensor([0, 1, 0], dtype=torch.int32, device="cuda")
    eager = symm_square(planes, 2.0, -1.0, done=done, backend="triton")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = symm_square(planes, 2.0, -1.0, done=done, backend="triton")
    graph.replay()
    assert torch.equal(captured.matrix.hi, eager.matrix.hi) and torch.equal(captured.trace, eager.trace)


def test_merge_by_the_kernels_equals_that_by_the_reference():
    matrices = torch.randn(3, 1200, 1024, device="cuda")
    reference = products_tsv_merge(matrices, [341] * 3, None, "float64").matrix
    with dispatch.use_backend(**TRITON):
        got = products_tsv_merge(matrices, [341] * 3)
    assert relative_error(got.matrix.cpu(), reference.cpu()) < 1e-4
    assert got.orthogonality < 1e-5
