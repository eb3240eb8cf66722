import numpy as np
import oracle
import pytest
import torch
from compare import relative_error
from hypothesis import given
from hypothesis import strategies as st
from spectra import KINDS, rank_of, spectrum

from r_tsvm_kernels.bench import published
from r_tsvm_kernels.errors import ConfigError, ConvergenceError, DTypeError, NonFiniteError, ShapeError
from r_tsvm_kernels.linalg import Certificate, tsv_merge


# 0.0: all singular values are equal up to the rounding of the matrix, which decides.
@pytest.mark.parametrize("power", [0.0, 0.3, 0.7, 1.2])
@pytest.mark.parametrize(("m", "n"), [(48, 48), (30, 75), (75, 30)])
@pytest.mark.parametrize("tasks", [1, 2, 3, 8])
def test_equals_float64_svd(power, m, n, tasks):
    matrices = [spectrum(f"power {power}", m, n, seed) for seed in range(tasks)]
    ranks, weights = [min(m, n) // tasks] * tasks, [1.0 + 0.1 * t for t in range(tasks)]
    got = tsv_merge(matrices, ranks, weights)
    exact = oracle.tsv_merge([matrix.double().numpy() for matrix in matrices], ranks, weights)
    assert relative_error(got.matrix, exact) < 1e-6
    assert got.ranks == tuple(ranks)
    assert got.certificate.met
    assert got.certificate.basis_rank == (sum(ranks), sum(ranks))


@given(st.lists(st.integers(0, 9), min_size=1, max_size=5), st.integers(0, 99))
def test_a_rank_per_task(ranks, seed):
    matrices = [spectrum("power 0.5", 50, 45, seed + t) for t in range(len(ranks))]
    got = tsv_merge(matrices, ranks)
    exact = (
        oracle.tsv_merge([matrix.double().numpy() for matrix in matrices], ranks, [1.0] * len(ranks))
        if any(ranks)
        else 0
    )
    assert relative_error(got.matrix, np.broadcast_to(exact, (50, 45)).copy()) < 1e-6
    assert got.ranks == tuple(ranks)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("tasks", [2, 3, 8])
@pytest.mark.parametrize(
    "share", [pytest.param(1, id="k = r / T"), pytest.param(4, id="k = r / 4T", marks=pytest.mark.exhaustive)]
)
def test_large_enough_for_the_float32_route(kind, tasks, share):
    matrices = [spectrum(kind, 288, 256, seed) for seed in range(tasks)]
    rank = 256 // tasks // share
    kept = [min(rank, rank_of(kind, 256, 1))] * tasks  # the published method does not clip to the numerical rank
    exact, single = published.tsv_merge([m.double() for m in matrices], kept), published.tsv_merge(matrices, kept)
    got = tsv_merge(matrices, [rank] * tasks)
    error = relative_error(got.matrix, exact.numpy())
    assert error <= 2 * relative_error(single, exact.numpy())
    assert error <= got.certificate.error <= 1e-4
    fast = tsv_merge(matrices, [rank] * tasks, mode="fast")
    assert relative_error(fast.matrix, exact.numpy()) <= fast.certificate.error <= 1e-2


@pytest.mark.parametrize("shape", [(900, 40), (40, 900)], ids=str)
def test_row_tiles_give_the_same_merge(shape):
    matrices = [spectrum("power 0.3", *shape, seed) for seed in range(3)]
    whole = tsv_merge(matrices, [13] * 3)
    tiled = tsv_merge(matrices, [13] * 3, workspace=2 * 8 * 40 * 256)  # 256 rows of four tiles, the images not kept
    assert relative_error(tiled.matrix, whole.matrix) < 1e-6
    assert tiled.certificate.basis_condition == pytest.approx(whole.certificate.basis_condition, rel=1e-6)


@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_the_route_of_matrix_products(mode):
    matrices = [spectrum("power 0.3", 96, 80, seed) for seed in range(3)]
    matrices[0][:, 5] = matrices[1][:, 5] = matrices[2][:, 5] = 0
    got = tsv_merge(matrices, [20, 25, 10], [1.0, 2.0, 0.5], mode=mode, solver="products")
    expected = tsv_merge(matrices, [20, 25, 10], [1.0, 2.0, 0.5])
    assert got.certificate.route == "products-fp16x3"
    assert relative_error(got.matrix, expected.matrix) <= got.certificate.error <= got.certificate.tolerance
    assert got.captured_energy == pytest.approx(expected.captured_energy, rel=1e-3)
    assert not got.matrix[:, 5].any()


@pytest.mark.parametrize("case", ["above the numerical rank", "a rule", "no room", "no gap"])
def test_products_give_way_to_eigenvalues(case):
    kind = {"above the numerical rank": "low rank", "no gap": "power 0.0"}.get(case, "flat")
    matrices = [spectrum(kind, 40, 40, seed) for seed in range(2)]
    ranks = [lambda values: 7] * 2 if case == "a rule" else [30, 30] if case == "no room" else [20, 20]
    got = tsv_merge(matrices, ranks, solver="products")
    assert torch.equal(got.matrix, tsv_merge(matrices, ranks).matrix)
    assert got.certificate.route in ("gram-float64", "svd-float64")
    assert "products" in got.certificate.escalations[0]


def test_nearly_dependent_bases_take_the_exact_route_and_say_so():
    first = spectrum("power 0.5", 60, 60, 0)
    matrices = [first, first + 3e-6 * torch.randn(60, 60)]
    got = tsv_merge(matrices, [20, 20])
    assert relative_error(got.matrix, oracle.tsv_merge([m.double().numpy() for m in matrices], [20, 20], [1, 1])) < 1e-4
    assert got.certificate.route == "svd-float64"
    assert max(got.certificate.basis_condition) > 1e5
    assert any("basis" in reason for reason in got.certificate.escalations)


def test_rank_rules_are_asked_with_all_singular_values():
    matrices = [spectrum("power 0.7", 30, 40, seed) for seed in range(2)]
    for matrix in matrices:
        matrix[:8] = 0  # left out of the solve, but zeros of the spectrum
    seen = [], []
    tsv_merge(matrices, [lambda values, t=t: seen[t].append(values) or 5 for t in range(2)])
    for matrix, asked in zip(matrices, seen, strict=True):
        exact = torch.linalg.svdvals(matrix.double())  # a rule must not depend on the unit
        for values in asked:  # also a little larger and smaller, to learn whether rounding decides
            assert torch.allclose(values / values[0], exact / exact[0], atol=1e-7)


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
    with pytest.raises(DTypeError, match="float16"):
        tsv_merge([matrix.half()], [1])
    with pytest.raises(NonFiniteError, match="NaN"):
        tsv_merge([torch.full((4, 4), torch.inf)], [1])
    with pytest.raises(ConfigError, match="mode"):
        tsv_merge([matrix], [1], mode="quick")
    with pytest.raises(ConfigError, match="solver"):
        tsv_merge([matrix], [1], solver="magic")


def test_a_missed_certificate_raises():
    Certificate(error=1e-5, orthogonality=1e-5, subspace_error=0.0, tolerance=1e-4, route="svd-float64").require()
    for bad in (1e-3, float("nan")):
        missed = Certificate(error=bad, orthogonality=bad, subspace_error=0.0, tolerance=1e-4, route="svd-float64")
        assert not missed.met
        with pytest.raises(ConvergenceError, match="orthogonality"):
            missed.require()


@pytest.mark.parametrize("apart", [1e-3, 1e-5, 1e-6])
def test_nearly_equal_tasks(apart):
    """Their bases share all directions up to differences that float64 barely resolves."""
    common = torch.randn(60, 60, dtype=torch.float64)
    tasks = [common + apart * torch.randn(60, 60, dtype=torch.float64) for _ in range(3)]
    merged = tsv_merge(tasks, [20] * 3)
    assert merged.certificate.route == "svd-float64"
    assert merged.certificate.error < 1e-6
    assert max(merged.certificate.basis_rank) <= 60


def test_large_bases_are_whitened_by_float32_eigenvectors():
    """Less exact than float64 throughout, but within the certificate, and nearer to float64 than SVDs in float32."""
    matrices = [torch.randn(820, 800) for _ in range(3)]
    merged = tsv_merge(matrices, [266] * 3)
    exact = tsv_merge([matrix.double() for matrix in matrices], [266] * 3)
    assert merged.certificate.route != "svd-float64" and not merged.certificate.escalations
    error = relative_error(merged.matrix, exact.matrix)
    assert exact.certificate.error < 1e-6
    assert 4e-7 < error < 5e-6
    assert error < 2 * merged.certificate.error < 1e-4
    assert error < relative_error(published.tsv_merge(matrices, [266] * 3), exact.matrix)
