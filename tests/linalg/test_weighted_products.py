"""Weighted orthogonalisation from matrix products alone, against float64 SVDs and solver ``eigen``."""

import numpy as np
import oracle
import pytest
import torch
from spectra import spectrum

from r_tsvm_kernels.errors import ConfigError, NonFiniteError, ShapeError
from r_tsvm_kernels.linalg import Factored, long_side_is_whole, weighted_merge, weighted_merge_layers

SHAPES = [((64, 64), 3), ((52, 60), 2), ((150, 48), 3), ((40, 170), 4)]


def relative(found, exact):
    return float(np.linalg.norm(found.double().numpy() - exact) / np.linalg.norm(exact))


@pytest.mark.parametrize(("shape", "tasks"), SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["flat", "power 0.7"])
def test_against_singular_vectors(shape, tasks, kind):
    matrices = [10.0 ** (t - 1) * spectrum(kind, *shape, t) for t in range(tasks)]
    weights = [1.0, -0.5, 2.0, 0.3][:tasks]
    lead = None if long_side_is_whole(shape, tasks) else -(-min(shape) // tasks)
    exact = oracle.weighted_merge([matrix.double().numpy() for matrix in matrices], weights, 1.0, None, lead)
    got, eigen = (weighted_merge(matrices, weights, solver=solver) for solver in ("products", "eigen"))
    assert got.certificate.route == "products-fp16x3"
    assert got.certificate.escalations == ()
    assert relative(got.matrix, exact) < min(got.certificate.error, 2e-5)
    assert got.ranks == eigen.ranks
    assert got.retained == pytest.approx(eigen.retained, abs=1e-5)
    assert got.certificate.basis_rank == eigen.certificate.basis_rank
    assert got.certificate.basis_condition == pytest.approx(eigen.certificate.basis_condition, rel=0.1)
    assert got.matrix.dtype == torch.float32


def test_float64_transposed_and_scaled():
    matrices = [spectrum("flat", 90, 30, t).double() for t in range(3)]
    got = weighted_merge(matrices, solver="products")
    assert got.matrix.dtype == torch.float64
    flat = weighted_merge([matrix.mT for matrix in matrices], solver="products")
    assert torch.allclose(flat.matrix.mT, got.matrix, rtol=0, atol=1e-6 * float(got.matrix.abs().max()))
    for factor in (2.0**-300, 2.0**300):
        scaled = weighted_merge([factor * matrix for matrix in matrices], solver="products")
        assert torch.equal(scaled.matrix, factor * got.matrix)


def test_zero_tasks_rows_and_columns():
    matrices = [spectrum("flat", 60, 50, t) for t in range(3)]
    matrices[1].zero_()
    for matrix in matrices:
        matrix[7] = 0
        matrix[:, 3] = 0
    got = weighted_merge(matrices, solver="products")
    assert got.certificate.route == "products-fp16x3"
    assert got.ranks[1] == 0
    assert not got.matrix[7].any()
    assert not got.matrix[:, 3].any()
    assert relative(got.matrix, weighted_merge(matrices).matrix.double().numpy()) < 2e-5


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"power": 0.5}, "needs power 1"),
        ({"ranks": 4}, "no limits of the ranks"),
        ({"low": True}, "the estimated error"),
        ({"factored": True}, None),
    ],
    ids=str,
)
def test_what_it_cannot_do_eigen_does(options, reason):
    generator = torch.Generator().manual_seed(0)
    factors = [(torch.randn(40, 3, generator=generator), torch.randn(3, 30, generator=generator)) for _ in range(2)]
    matrices = [spectrum("flat", 40, 30, t) for t in range(2)]
    if options.pop("low", False):
        matrices = [left @ right for left, right in factors]
    if options.pop("factored", False):
        matrices = [Factored(*pair) for pair in factors]
    got = weighted_merge(matrices, solver="products", **options)
    assert not got.certificate.route.startswith("products")
    assert got.certificate.met
    assert reason is None or reason in got.certificate.escalations[0]


@pytest.mark.parametrize("solver", ["eigen", "products"])
def test_layers(solver):
    layers = [[spectrum("flat", 48, 40, 3 * i + t) for t in range(3)] for i in range(4)]
    layers[1][0].zero_()
    layers[2] = [layer.mT.contiguous() for layer in layers[2]]
    layers.append([spectrum("low rank", 48, 40, t) for t in range(3)])
    weights = [[1.0, 2.0, 3.0]] * 5
    merged = weighted_merge_layers(layers, weights, solver=solver)
    for layer, found in zip(layers, merged, strict=True):
        alone = weighted_merge(layer, weights[0], solver=solver)
        assert found.ranks == alone.ranks
        assert found.certificate.route == alone.certificate.route
        assert torch.allclose(found.matrix, alone.matrix, rtol=0, atol=1e-6 * float(alone.matrix.abs().max()))


@pytest.mark.parametrize("shape", [(20, 20), (40, 10)])
def test_weights_of_zero(shape):
    layer = [spectrum("flat", *shape, t) for t in range(2)]
    zero, one = weighted_merge_layers([layer] * 2, [0.0, 1.0], solver="products")
    for found in (zero, weighted_merge(layer, 0.0, solver="products")):
        assert not found.matrix.any()
        assert found.certificate.met and found.certificate.route == "products-fp16x3"
        assert found.retained == pytest.approx(one.retained)
    assert one.matrix.any()


def test_arguments():
    layer = [spectrum("flat", 20, 10, t) for t in range(2)]
    with pytest.raises(ConfigError, match="solver must be one of"):
        weighted_merge(layer, solver="lapack")
    with pytest.raises(ShapeError, match="2 layers, weights for 1; give each layer its own"):
        weighted_merge_layers([layer, layer], [1.0])
    for weights in (1.0, torch.tensor(1.0)):
        with pytest.raises(ShapeError, match="2 layers, weights for all"):
            weighted_merge_layers([layer, layer], weights)
    with pytest.raises(NonFiniteError):
        weighted_merge(layer, [1e308, 1e308], solver="products")
    layer[1][0, 0] = torch.nan
    with pytest.raises(NonFiniteError):
        weighted_merge_layers([layer, layer], solver="products")
