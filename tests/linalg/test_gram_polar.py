"""Polar factors by products with the Gram matrix, and the measurement of their errors, against float64 SVDs."""

import pytest
import torch

from r_tsvm_kernels.linalg.products.gram_polar import STAGES, gram_polar
from r_tsvm_kernels.linalg.products.number_formats import arithmetic
from r_tsvm_kernels.linalg.products.polar_accuracy import MeasuredPolar


def matrix_with(condition, m, k, seed=0):
    """Return X, its polar factor and the inverse root of its Gram matrix; logarithmically even singular values."""
    generator = torch.Generator().manual_seed(seed)
    U, V = (torch.linalg.qr(torch.randn(size, k, generator=generator, dtype=torch.float64)).Q for size in (m, k))
    values = torch.logspace(0, -1, k, dtype=torch.float64) ** torch.tensor(condition).log10()
    return (U * values) @ V.mT, U @ V.mT, (V / values) @ V.mT


def distance(found, exact):
    return float(torch.linalg.vector_norm(found.double() - exact) / torch.linalg.vector_norm(exact))


@pytest.mark.parametrize("shape", [(150, 50), (64, 64), (90, 37)], ids=str)
@pytest.mark.parametrize("condition", [1.5, 3e1, 1e3, 1e5])
def test_polar_factor_and_inverse_root(shape, condition):
    X, exact, root = matrix_with(condition, *shape)
    found = gram_polar(X[None])
    bound = 2e-5 + 1e-8 * condition  # of formats with the accuracy of float32
    assert distance(found.matrix[0], exact) < bound
    assert distance(found.root[0].double() * found.gain[0], root) < bound
    assert torch.equal(found.root, found.root.mT)
    assert float(found.smallest[0]) * condition == pytest.approx(1, rel=0.2)
    assert float(found.largest[0]) == pytest.approx(1, rel=0.2)
    assert float(found.gain[0]) >= 0.99 * condition
    assert 1 <= found.stages <= STAGES


def test_float64_is_exact():
    X, exact, _ = matrix_with(1e3, 80, 40)
    assert distance(gram_polar(X[None], "float64").matrix[0], exact) < 1e-9


def test_matrices_of_a_batch_have_their_own_scale():
    parts = [matrix_with(condition, 60, 30, seed) for seed, condition in enumerate((2.0, 500.0))]
    scales = torch.tensor([0.3, 2.0], dtype=torch.float64)
    found = gram_polar(torch.stack([X for X, _, _ in parts]) * scales[:, None, None])
    for i, (_, exact, root) in enumerate(parts):
        assert distance(found.matrix[i], exact) < 2e-5
        assert distance(found.root[i].double() * found.gain[i] * scales[i], root) < 2e-5


def test_a_missing_rank_shows():
    X, _, _ = matrix_with(10.0, 60, 30)
    X[:, 3] = X[:, 5]
    found = gram_polar(X[None])
    (measured,) = MeasuredPolar.of_batch(X[None], found, arithmetic("fp16x3"))
    assert not measured.error(torch.eye(30, dtype=torch.float64)) < 0.5


@pytest.mark.parametrize("condition", [2.0, 4e1, 1e3, 1e5])
@pytest.mark.parametrize("wrong", ["nothing", "turned", "stretched", "outside"])
def test_errors_are_measured(condition, wrong):
    X, exact, _ = matrix_with(condition, 150, 50)
    found = gram_polar(X[None])
    generator = torch.Generator().manual_seed(1)
    noise = 1e-3 * torch.randn(150, 50, generator=generator, dtype=torch.float64)
    inside = exact.mT @ noise
    change = {
        "nothing": 0 * noise,
        "turned": exact @ (inside - inside.mT),
        "stretched": exact @ (inside + inside.mT),
        "outside": noise - exact @ inside,
    }[wrong]
    found.matrix.add_(change)
    (measured,) = MeasuredPolar.of_batch(X[None], found, arithmetic("fp16x3"))
    for z in (torch.randn(50, 8, generator=generator, dtype=torch.float64), X.mT @ exact):
        true = float(torch.linalg.vector_norm((found.matrix[0].double() - exact) @ z))
        assert 0.8 * true < measured.error(z) < 6 * true
    w = torch.randn(150, 8, generator=generator, dtype=torch.float64)
    true = float(torch.linalg.vector_norm((found.matrix[0].double() - exact).mT @ w))
    assert 0.8 * true < measured.error_transposed(w) < 6 * true
