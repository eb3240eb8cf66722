import pytest
import torch

from r_tsvm_kernels.linalg import polar_factor


@pytest.mark.parametrize("shape", [(30, 30), (50, 12), (12, 50), (1, 5), (1, 1)], ids=str)
def test_nearest_matrix_with_orthonormal_columns(shape):
    matrix = torch.randn(shape, dtype=torch.float64)
    factor = polar_factor(matrix)
    Q = factor.matrix if shape[0] >= shape[1] else factor.matrix.mT
    X = matrix if shape[0] >= shape[1] else matrix.mT
    assert factor.rank == min(shape)
    assert (Q.mT @ Q - torch.eye(min(shape))).abs().max() < 1e-12
    # X = Q H with H symmetric and positive semi-definite characterises the polar decomposition.
    H = Q.mT @ X
    assert (H - H.mT).abs().max() < 1e-12
    assert torch.linalg.eigvalsh(H).min() > 0
    assert (Q @ H - X).abs().max() < 1e-12


def test_ill_conditioned_basis_keeps_full_rank():
    U, V = (torch.linalg.qr(torch.randn(40, 40, dtype=torch.float64)).Q for _ in range(2))
    factor = polar_factor((U * torch.logspace(0, -4, 40, dtype=torch.float64)) @ V)
    assert factor.rank == 40
    assert factor.condition == pytest.approx(1e4, rel=1e-6)
    assert (factor.matrix - U @ V).abs().max() < 1e-10


def test_rank_deficient_gives_a_partial_isometry():
    Q = torch.linalg.qr(torch.randn(20, 5, dtype=torch.float64)).Q
    factor = polar_factor(torch.cat([Q, Q], dim=1))
    assert factor.rank == 5
    assert torch.allclose(factor.matrix, torch.cat([Q, Q], dim=1) / 2**0.5)
    values = torch.linalg.svdvals(factor.matrix)
    assert torch.allclose(values[:5], torch.ones(5, dtype=torch.float64))
    assert values[5:].max() < 1e-12


def test_zero_rows_stay_zero():
    matrix = torch.randn(10, 4, dtype=torch.float64)
    matrix[3:7] = 0
    matrix[:, 3] = matrix[:, 0]
    factor = polar_factor(matrix)
    assert factor.rank == 3
    assert factor.matrix[3:7].abs().max() < 1e-14


@pytest.mark.parametrize("shape", [(6, 0), (0, 6), (5, 3)], ids=str)
def test_empty_and_zero(shape):
    factor = polar_factor(torch.zeros(shape, dtype=torch.float64))
    assert (factor.matrix.shape, factor.rank, factor.condition) == (shape, 0, 1.0)
    assert not factor.matrix.any()
