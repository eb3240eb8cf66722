import pytest
import torch
from compare import relative_error

from r_tsvm_kernels.errors import ConfigError
from r_tsvm_kernels.linalg import Factored, weighted_sum
from r_tsvm_kernels.lora import rank_of, truncated


def update(m, n, r, seed, scale=1.5):
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((m, r), (r, n)))
    return Factored(left, right, scale)


@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (6, 50)], ids=str)
def test_truncation_is_the_best_of_its_rank(shape):
    matrix = update(*shape, 8, 0)
    U, values, Vh = torch.linalg.svd(matrix.dense(), full_matrices=False)
    for rank in (1, 3, 6, 50):
        got, energy = truncated(matrix, rank)
        k = min(rank, 8, *shape)
        assert got.left.shape == (shape[0], k)
        assert relative_error(got.dense(), U[:, :k] * values[:k] @ Vh[:k]) < 1e-12
        assert energy == pytest.approx(float(values[:k].square().sum() / values.square().sum()))
        assert relative_error(got.left.norm(), got.right.norm()) < 1e-12


def test_an_inner_dimension_above_the_rank():
    matrix = update(5, 4, 9, 0)
    got, energy = truncated(matrix, 9)
    assert got.left.shape == (5, 4) and energy == pytest.approx(1)
    assert relative_error(got.dense(), matrix.dense()) < 1e-12


def test_weighted_sum():
    matrices = [update(30, 20, r, r) for r in (2, 3)]
    got = weighted_sum(matrices, [0.5, -2.0])
    assert got.left.shape == (30, 5)
    assert relative_error(got.dense(), 0.5 * matrices[0].dense() - 2 * matrices[1].dense()) < 1e-12


def test_rules():
    values = torch.tensor([4.0, 2.0, 1.0, 0.1, 0.1, 0.1], dtype=torch.float64)
    assert rank_of((6, 9), None) == 6 and rank_of((6, 9), 4) == 4
    by_energy, at_most_one, by_noise = (
        rank_of((6, 9), None, 0.95),
        rank_of((6, 9), 1, 0.95),
        rank_of((6, 9), 3, None, True),
    )
    assert (by_energy(values), at_most_one(values), by_noise(values)) == (2, 1, 3)


@pytest.mark.parametrize(
    ("rank", "energy", "noise"), [(0, None, False), (None, 1.5, False), (None, 0.0, False), (2, 0.5, True)]
)
def test_refused_ranks(rank, energy, noise):
    with pytest.raises(ConfigError):
        rank_of((6, 9), rank, energy, noise)
