import numpy as np
import pytest
import torch

from r_tsvm_kernels.errors import ConvergenceError, ShapeError
from r_tsvm_kernels.linalg import leading_subspaces


def check(matrix, rank, expected_rank):
    parts = leading_subspaces(matrix, rank)
    exact = matrix.double()
    values = torch.from_numpy(np.linalg.svd(exact.numpy(), compute_uv=False))
    assert parts.rank == expected_rank
    eye = torch.eye(expected_rank, dtype=torch.float64)
    assert (parts.U.mT @ parts.U - eye).abs().max() < 1e-12
    assert (parts.Vh @ parts.Vh.mT - eye).abs().max() < 1e-12
    norm = exact.norm()
    assert (exact @ parts.Vh.mT - parts.U @ parts.core).norm() <= 1e-12 * norm
    assert (exact.mT @ parts.U - parts.Vh.mT @ parts.core.mT).norm() <= 1e-12 * norm
    assert torch.allclose(torch.linalg.svdvals(parts.core), values[:expected_rank], rtol=1e-12)
    assert parts.captured_energy == pytest.approx(float((values[:expected_rank] ** 2).sum() / (values**2).sum()))
    assert parts.residual < 1e-12
    return parts


@pytest.mark.parametrize("shape", [(40, 40), (64, 17), (17, 64), (1, 9), (9, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_leading_singular_subspaces(shape, dtype):
    check(torch.randn(shape, dtype=dtype), max(1, min(shape) // 3), max(1, min(shape) // 3))
    check(torch.randn(shape, dtype=dtype), min(shape), min(shape))


@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_badly_scaled(scale):
    check(torch.randn(20, 30) * scale, 7, 7)


def test_graded_and_repeated_spectra():
    U, V = (torch.linalg.qr(torch.randn(32, 32, dtype=torch.float64)).Q for _ in range(2))
    check((U * torch.logspace(0, -5, 32, dtype=torch.float64)) @ V, 12, 12)
    check(torch.eye(32), 12, 12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rank_is_clipped_to_the_numerical_rank(dtype):
    low = torch.randn(50, 4, dtype=dtype) @ torch.randn(4, 30, dtype=dtype)
    parts = check(low, 20, 4)
    assert parts.captured_energy == pytest.approx(1.0)
    check(torch.outer(torch.randn(8, dtype=dtype), torch.randn(5, dtype=dtype)), 5, 1)


def test_zero_matrix_and_rank_zero():
    parts = leading_subspaces(torch.zeros(6, 4), 3)
    assert (parts.rank, parts.U.shape, parts.Vh.shape, parts.captured_energy) == (0, (6, 0), (0, 4), 1.0)
    parts = leading_subspaces(torch.randn(6, 4), 0)
    assert (parts.rank, parts.captured_energy) == (0, 0.0)


def test_what_it_refuses():
    with pytest.raises(ShapeError):
        leading_subspaces(torch.zeros(2, 3, 4), 1)
    with pytest.raises(ConvergenceError, match="did not converge"):
        leading_subspaces(torch.full((8, 8), torch.nan), 2)
