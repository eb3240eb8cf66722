"""The loops of the matrix-product route as CUDA graphs, on a GPU: the same bits as launch by launch."""

import pytest
import torch

from r_tsvm_kernels.dispatch import use_backend
from r_tsvm_kernels.linalg import tsv_merge, use_cuda_graphs
from r_tsvm_kernels.linalg.products.cuda_graph import Graphs, record, tensors_in
from r_tsvm_kernels.linalg.products.merge import products_tsv_merge

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="records CUDA graphs: needs a CUDA device"),
]

PRODUCTS = ("split_planes", "symm_gram", "symm_square", "gemm3")


@pytest.mark.parametrize("precision", ["fp16x3", "fp16", "float32"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(("shape", "ranks"), [((640, 512), [170, 171, 171]), ((512, 600), [40, 60, 20])])
def test_merges_are_the_same_bits(shape, ranks, backend, precision):
    layers = torch.randn(4, 3, *shape, device="cuda")
    with use_backend(**dict.fromkeys(PRODUCTS, backend)):
        expected = [products_tsv_merge(layer, ranks, None, precision) for layer in layers]
        with use_cuda_graphs() as graphs:
            got = [products_tsv_merge(layer, ranks, None, precision) for layer in layers]
            assert graphs.nbytes > 0
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one.matrix, other.matrix)
        assert [part.outer_steps for part in one.parts] == [part.outer_steps for part in other.parts]


def test_a_recorded_function_is_replayed_on_other_values():
    def function(x, factors):
        for factor in factors:
            x = factor * (x @ x.mT) / x.shape[0]
        return [x, x.sum()]

    given = [(torch.randn(256, 256, device="cuda"), (0.5, 0.25)) for _ in range(3)]
    recording = record(function, given[0])
    assert recording.nbytes >= 256 * 256 * 4
    for arguments in given:
        for one, other in zip(recording(arguments), function(*arguments), strict=True):
            assert torch.equal(one, other)


def test_memory_is_given_back():
    matrices = torch.randn(3, 1024, 1024, device="cuda")

    def reserved_after_graphs():
        with use_cuda_graphs() as graphs:
            for _ in range(3):
                tsv_merge(list(matrices), [341] * 3, solver="products")
            assert graphs.nbytes > 0
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    first = reserved_after_graphs()  # with workspaces of cuBLAS, which stay
    assert [reserved_after_graphs() for _ in range(3)] == [first] * 3


def test_a_limit_of_zero_keeps_no_graph():
    x = torch.randn(64, 64, device="cuda")
    graphs = Graphs(0)
    for _ in range(3):
        assert all(torch.equal(y, 2 * x) for y in tensors_in(graphs.call(torch.mul, (x, 2.0))))
    assert graphs.nbytes == 0
