"""Thin QR: residual, orthogonality and rows of zeros, whether Cholesky factorisations do or LAPACK has to."""

import pytest
import torch

from r_tsvm_kernels.linalg.orthonormal import orthogonality, thin_qr

EPS = torch.finfo(torch.float64).eps


def with_condition(rows, columns, condition, seed=0):
    generator = torch.Generator().manual_seed(seed)
    U, V = (torch.linalg.qr(torch.randn(n, columns, generator=generator).double()).Q for n in (rows, columns))
    return U * torch.logspace(0, -torch.tensor(condition).log10(), columns, dtype=torch.float64) @ V.T


def check(Y, dependent=False):
    Q, R = thin_qr(Y)
    k = min(Y.shape)
    assert (Q.shape, R.shape) == ((Y.shape[0], k), (k, Y.shape[1]))
    P, values, _ = torch.linalg.svd(R, full_matrices=False)
    spanning = Q @ P[:, values > 64 * EPS * values.sum()] if dependent else Q
    assert float(orthogonality(spanning)) < 16 * EPS
    # Column by column: a small one is as exact as a large one.
    assert bool(((Q @ R - Y).norm(dim=0) <= 32 * EPS * Y.norm(dim=0)).all())
    assert torch.equal(R, R.triu())
    return Q


@pytest.mark.parametrize("shape", [(1, 1), (48, 48), (300, 20), (257, 33), (20, 60), (5, 0)])
def test_shapes(shape):
    check(torch.randn(shape, generator=torch.Generator().manual_seed(1)).double())


@pytest.mark.parametrize("condition", [1e2, 1e6, 1e9, 1e13])
def test_ill_conditioned(condition):
    check(with_condition(200, 24, condition))


def test_thin_factors_never_see_lapack(monkeypatch):
    monkeypatch.setattr(torch.linalg, "qr", lambda *_: pytest.fail("LAPACK's QR was called"))
    scales = torch.logspace(-12, 12, 24, dtype=torch.float64)
    check(torch.randn(200, 24, generator=torch.Generator().manual_seed(2)).double() * scales)


def test_dependent_columns():
    Y = torch.randn(100, 8, generator=torch.Generator().manual_seed(3)).double()
    check(torch.cat([Y, 2 * Y], dim=1), dependent=True)
    check(torch.cat([Y, Y + 1e-11 * Y.flip(0)], dim=1), dependent=True)
    check(torch.zeros(10, 3).double(), dependent=True)


@pytest.mark.parametrize("copies", [1, 2])
def test_rows_of_zeros_stay_so(copies):
    Y = torch.randn(60, 6, generator=torch.Generator().manual_seed(4)).double().repeat(1, copies)
    Y[[0, 17]] = 0
    assert not check(Y, dependent=copies > 1)[[0, 17]].any()


@pytest.mark.parametrize("value", [1e-170, 1e170])
def test_squares_out_of_range(value):
    check(value * torch.randn(50, 5, generator=torch.Generator().manual_seed(5)).double())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_hidden(value):
    Y = torch.ones(50, 5).double().cumsum(0) ** torch.arange(5)
    Y[3, 2] = value
    assert not thin_qr(Y)[0].isfinite().all()
