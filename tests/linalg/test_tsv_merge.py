import numpy as np
import oracle
import pytest
import torch
from compare import relative_error
from hypothesis import given
from hypothesis import strategies as st

from r_tsvm_kernels.errors import ConvergenceError, ShapeError
from r_tsvm_kernels.linalg import Certificate, tsv_merge


def spectrum(m, n, power, seed):
    """Random matrix whose singular values fall like i^-power."""
    generator = torch.Generator().manual_seed(seed)
    r = min(m, n)
    U = torch.linalg.qr(torch.randn(m, r, generator=generator, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(n, r, generator=generator, dtype=torch.float64)).Q
    return ((U * torch.arange(1, r + 1, dtype=torch.float64) ** -power) @ V.mT).float()


@pytest.mark.parametrize("power", [0.0, 0.3, 0.7, 1.2])
@pytest.mark.parametrize(("m", "n"), [(48, 48), (30, 75), (75, 30)])
@pytest.mark.parametrize("tasks", [1, 2, 3, 8])
def test_equals_float64_svd(power, m, n, tasks):
    matrices = [spectrum(m, n, power, seed) for seed in range(tasks)]
    ranks, weights = [min(m, n) // tasks] * tasks, [1.0 + 0.1 * t for t in range(tasks)]
    got = tsv_merge(matrices, ranks, weights)
    exact = oracle.tsv_merge([matrix.double().numpy() for matrix in matrices], ranks, weights)
    assert relative_error(got.matrix, exact) < 1e-6
    assert got.ranks == tuple(ranks)
    assert got.certificate.met
    assert got.certificate.basis_rank == (sum(ranks), sum(ranks))


@given(st.lists(st.integers(0, 9), min_size=1, max_size=5), st.integers(0, 99))
def test_a_rank_per_task(ranks, seed):
    matrices = [spectrum(50, 45, 0.5, seed + t) for t in range(len(ranks))]
    got = tsv_merge(matrices, ranks)
    exact = (
        oracle.tsv_merge([matrix.double().numpy() for matrix in matrices], ranks, [1.0] * len(ranks))
        if any(ranks)
        else 0
    )
    assert relative_error(got.matrix, np.broadcast_to(exact, (50, 45)).copy()) < 1e-6
    assert got.ranks == tuple(ranks)


def test_rows_and_columns_nobody_touched_are_exactly_zero():
    matrices = [torch.randn(40, 30) for _ in range(3)]
    for matrix in matrices:
        matrix[5:20] = 0
        matrix[:, [3, 7]] = 0
    matrices[1][0] = 0  # touched by the others
    got = tsv_merge(matrices, [10, 10, 10])
    assert not got.matrix[5:20].any() and not got.matrix[:, [3, 7]].any()
    assert got.matrix[0].any()
    # 25 rows for 30 directions: the left basis cannot have full rank, and the certificate says so.
    assert got.certificate.basis_rank == (25, 28)
    assert torch.linalg.vector_norm(got.matrix) > 0


def test_equal_tasks_give_the_truncation_back():
    matrix = torch.randn(30, 30)
    got = tsv_merge([matrix, matrix.clone()], [15, 15])
    U, s, Vh = np.linalg.svd(matrix.double().numpy())
    assert relative_error(got.matrix, (U[:, :15] * s[:15]) @ Vh[:15]) < 1e-6
    assert got.certificate.basis_rank == (15, 15)


def test_low_rank_task_vectors_are_clipped():
    matrices = [torch.randn(40, 2) @ torch.randn(2, 40) for _ in range(3)]
    got = tsv_merge(matrices, [13, 13, 13])
    assert got.ranks == (2, 2, 2)
    assert got.captured_energy == pytest.approx((1.0, 1.0, 1.0))


@pytest.mark.parametrize("scale", [1e-20, 1e15])
def test_badly_scaled(scale):
    matrices = [torch.randn(20, 20), torch.randn(20, 20)]
    plain = tsv_merge(matrices, [10, 10]).matrix
    assert relative_error(tsv_merge([scale * m for m in matrices], [10, 10]).matrix / scale, plain) < 1e-5


def test_tasks_of_very_different_size():
    matrices = [torch.randn(20, 20) * 1e-6, torch.randn(20, 20) * 1e3]
    exact = oracle.tsv_merge([m.double().numpy() for m in matrices], [10, 10], [1.0, 1.0])
    assert relative_error(tsv_merge(matrices, [10, 10]).matrix, exact) < 1e-6


def test_zero_tasks():
    got = tsv_merge([torch.zeros(4, 3), torch.zeros(4, 3)], [1, 1])
    assert not got.matrix.any()
    assert (got.ranks, got.captured_energy, got.certificate.met) == ((0, 0), (1.0, 1.0), True)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1)], ids=str)
def test_tiny(shape):
    matrix = torch.randn(shape)
    assert relative_error(tsv_merge([matrix], [1]).matrix, matrix) < 1e-6


def test_what_it_refuses():
    matrix = torch.randn(4, 4)
    for matrices, ranks, weights in [
        ([matrix, torch.randn(4, 5)], [1, 1], None),
        ([torch.randn(4)], [1], None),
        ([], [], None),
        ([matrix], [1, 1], None),
        ([matrix], [1], [1.0, 2.0]),
    ]:
        with pytest.raises(ShapeError, match="tsv_merge"):
            tsv_merge(matrices, ranks, weights)


def test_a_missed_certificate_raises():
    fine = Certificate(orthogonality=1e-15, residual=1e-15, tolerance=1e-9, route="svd-float64")
    fine.require()
    for bad in (1e-8, float("nan")):
        missed = Certificate(orthogonality=bad, residual=0.0, tolerance=1e-9, route="svd-float64")
        assert not missed.met
        with pytest.raises(ConvergenceError, match="orthogonality"):
            missed.require()
