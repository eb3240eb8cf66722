"""Several layers at once: the same results as one after the other, batched where they can be."""

import sys

import pytest
import torch
from compare import relative_error
from spectra import spectrum

from r_tsvm_kernels.errors import NonFiniteError, ShapeError
from r_tsvm_kernels.linalg import Factored, fixed_rank, tsv_merge, tsv_merge_layers
from r_tsvm_kernels.linalg.products.merge import products_tsv_merge, products_tsv_merges


def layer_of(shape, tasks=3, seed=0):
    return [spectrum("flat", *shape, 100 * seed + task) for task in range(tasks)]


@pytest.fixture
def batches(monkeypatch):
    """The shapes of the batches that were merged by products."""
    module, shapes = sys.modules["r_tsvm_kernels.linalg.products.layers"], []
    merge = module.products_tsv_merges

    def counted(layers, *args, **kwargs):
        shapes.append(tuple(layers.shape))
        return merge(layers, *args, **kwargs)

    monkeypatch.setattr(module, "products_tsv_merges", counted)
    return shapes


@pytest.mark.parametrize("solver", ["eigen", "products"])
def test_as_one_after_the_other(solver, batches):
    shapes = [(48, 48), (32, 64), (48, 48), (64, 32), (48, 48)]
    layers = [layer_of(shape, seed=i) for i, shape in enumerate(shapes)]
    ranks = [[fixed_rank(shape, 3)] * 3 for shape in shapes]
    ranks[2] = [4, 7, 9]  # its concatenated bases are narrower
    weights = [[1.0, 0.5, 2.0 + i] for i in range(5)]
    merged = tsv_merge_layers(layers, ranks, weights, solver=solver)
    if solver == "products":
        assert batches[0] == (3, 3, 48, 48) and all(shape[0] == 1 for shape in batches[1:])
    for layer, rank, factors, got in zip(layers, ranks, weights, merged, strict=True):
        exact = tsv_merge([matrix.double() for matrix in layer], rank, factors)
        assert got.matrix.dtype == torch.float32
        assert got.ranks == tuple(rank)
        assert got.certificate.route.startswith("products" if solver == "products" else ("gram", "svd"))
        assert got.captured_energy == pytest.approx(exact.captured_energy, rel=1e-4)
        assert relative_error(got.matrix, exact.matrix) < 3e-5


def test_what_does_not_suit_a_batch_is_merged_alone(batches):
    untouched = layer_of((40, 40), seed=1)
    for matrix in untouched:
        matrix[7] = 0
    low = [torch.randn(40, 3) @ torch.randn(3, 40) for _ in range(3)]  # ranks above the numerical rank
    layers = [layer_of((40, 40)), untouched, low, layer_of((40, 40), seed=2)]
    merged = tsv_merge_layers(layers, [[13] * 3] * 4, solver="products")
    assert batches[0] == (3, 3, 40, 40)
    assert (merged[1].matrix[7] == 0).all()
    assert merged[2].certificate.route != "products-fp16x3" and merged[2].certificate.escalations
    for layer, got in zip(layers, merged, strict=True):
        assert relative_error(got.matrix, tsv_merge(layer, [13] * 3).matrix) < 3e-5


def test_one_bad_layer_is_an_error():
    bad = layer_of((20, 20))
    bad[1][3, 3] = float("nan")
    with pytest.raises(NonFiniteError):
        tsv_merge_layers([layer_of((20, 20)), bad, layer_of((20, 20), seed=2)], [[6] * 3] * 3, solver="products")
    with pytest.raises(ShapeError, match="2 layers"):
        tsv_merge_layers([layer_of((20, 20))] * 2, [[6] * 3])
    with pytest.raises(ShapeError, match=r"2 layers, ranks for all \(6\)"):
        tsv_merge_layers([layer_of((20, 20))] * 2, 6)


def test_factored_layers():
    layer = [Factored(torch.randn(30, 4), torch.randn(4, 20)) for _ in range(2)]
    for solver in ("eigen", "products"):
        (merged,) = tsv_merge_layers([layer], [[4, 4]], solver=solver)
        assert torch.equal(merged.matrix, tsv_merge(layer, [4, 4]).matrix)


def test_a_batch_of_layers_equals_single_ones_by_products():
    layers = torch.stack([torch.stack(layer_of((36, 52), seed=i)) for i in range(3)])
    ranks = [[12] * 3, [12] * 3, [12] * 3]
    for got, layer in zip(products_tsv_merges(layers, ranks), layers, strict=True):
        assert relative_error(got.matrix, products_tsv_merge(layer, ranks[0]).matrix) < 1e-5
