"""Polar Express: generated coefficients against the published ones, and its accuracy in every number format."""

import numpy as np
import pytest
import torch
from compare import relative_error

from r_tsvm_kernels.bench import published
from r_tsvm_kernels.errors import ConfigError
from r_tsvm_kernels.linalg.products.polar_express import best_quintic, coefficients, polar_express

# For lower = 1e-3, as printed in arXiv 2505.16932.
PUBLISHED = [
    (8.287, -23.596, 17.300), (4.107, -2.948, 0.5448), (3.949, -2.909, 0.5518), (3.318, -2.488, 0.5100),
    (2.301, -1.669, 0.4188),
]  # fmt: skip


def bases(n, tasks, seed=0):
    generator = torch.Generator().manual_seed(seed)
    blocks = [
        torch.linalg.qr(torch.randn(n, n // tasks, generator=generator, dtype=torch.float64)).Q for _ in range(tasks)
    ]
    return torch.cat(blocks, 1)


def test_generates_the_published_coefficients():
    for ours, theirs in zip(coefficients(1e-3, 1e-7), PUBLISHED, strict=False):
        np.testing.assert_allclose(ours, theirs, rtol=2e-4)


@pytest.mark.parametrize(("low", "high"), [(1e-6, 1.0), (0.1, 1.9), (0.5, 1.5), (0.999, 1.001), (1.0, 1.0)])
def test_the_quintic_is_the_best(low, high):
    a, b, c = best_quintic(low, high)
    x = np.linspace(low, high, 100001)
    error = a * x + b * x**3 + c * x**5 - 1
    worst = np.abs(error).max()
    # Chebyshev: four extrema of one size and alternating sign.
    signs = np.sign(error[np.abs(error) > worst * (1 - 1e-6)])
    assert worst < 1e-9 or 1 + (np.diff(signs) != 0).sum() == 4


@pytest.mark.parametrize("lower", [0.5, 1e-1, 1e-3, 1e-5, 1e-8])
@pytest.mark.parametrize("margin", [0.0, 1e-5, 1e-2])
def test_the_composition_maps_to_one(lower, margin):
    x = np.concatenate([np.geomspace(lower, 1, 10001), [1 + margin / 2]])
    steps = coefficients(lower, 1e-7, margin)
    for a, b, c in steps:
        x = a * x + b * x**3 + c * x**5
    assert np.abs(x - 1).max() < 2e-6
    assert len(steps) <= 5 + np.ceil(np.log(1 / lower) / np.log(3.9))


@pytest.mark.parametrize(
    ("precision", "allowed"), [("float64", 1e-10), ("float32", 3e-5), ("fp16x3", 3e-5), ("fp16", 8e-3)]
)
@pytest.mark.parametrize("tasks", [2, 3, 8])
def test_polar_factor_of_concatenated_bases(tasks, precision, allowed):
    matrix = bases(96, tasks)
    got = polar_express(matrix, tasks**0.5, 1e-5, precision, tolerance=1e-12)
    assert relative_error(got.matrix, published.polar(matrix)) < allowed
    assert got.orthogonality < allowed
    assert got.steps <= 12


def test_a_batch_of_tall_matrices():
    matrix = torch.stack([bases(60, 3, seed)[:, :40] for seed in range(2)])
    got = polar_express(matrix, 3**0.5, 1e-4)
    assert got.matrix.shape == (2, 60, 40) and got.orthogonality.shape == (2,)
    assert relative_error(got.matrix, torch.stack([published.polar(x) for x in matrix])) < 1e-5


def test_a_deficient_basis_is_seen():
    same = bases(40, 2)[:, :20]
    got = polar_express(torch.cat([same, same], 1), 2**0.5, 1e-5)
    assert got.orthogonality > 1e-2
    near = bases(40, 1)
    near[:, 0] = near[:, 1] + 1e-7 * near[:, 0]
    assert polar_express(near, 1.5, 1e-3, "float64").orthogonality > 1e-2


def test_what_it_refuses():
    for lower, tolerance in [(0.0, 1e-3), (1.5, 1e-3), (1e-3, 0.0)]:
        with pytest.raises(ConfigError, match="lower"):
            coefficients(lower, tolerance)
