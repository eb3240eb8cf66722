import numpy as np
import oracle
import pytest
import torch
from compare import relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from spectra import KINDS, spectrum

from r_tsvm_kernels.errors import ConfigError, DTypeError, NonFiniteError, ShapeError
from r_tsvm_kernels.linalg import Factored, fixed_rank, long_side_is_whole, spectral_norm, tsv_merge, weighted_merge

SHAPES = [(48, 48), (40, 36), (75, 30), (30, 75)]


def tasks_of(kind, shape, tasks):
    return [spectrum(kind, *shape, seed) for seed in range(tasks)]


def lead_of(shape, tasks):
    return None if long_side_is_whole(shape, tasks) else -(-min(shape) // tasks)


def exact(matrices, weights, power, ranks=None):
    arrays = [matrix.double().numpy() for matrix in matrices]
    return oracle.weighted_merge(arrays, weights, power, ranks, lead_of(arrays[0].shape, len(arrays)))


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("power", [0.0, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tasks", [3, *(pytest.param(tasks, marks=pytest.mark.exhaustive) for tasks in (2, 8))])
def test_equals_float64_svd(kind, power, shape, tasks):
    matrices, weights = tasks_of(kind, shape, tasks), [1.0 + 0.1 * t for t in range(tasks)]
    got = weighted_merge(matrices, weights, power=power)
    assert relative_error(got.matrix, exact(matrices, weights, power)) <= got.certificate.error <= 1e-5


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(48, 48), (75, 30)], ids=str)
def test_ranks(power, shape):
    matrices, ranks = tasks_of("power 0.7", shape, 3), [10, 4, 25]
    got = weighted_merge(matrices, power=power, ranks=ranks)
    assert relative_error(got.matrix, exact(matrices, [1.0] * 3, power, ranks)) <= got.certificate.error <= 1e-5


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_power_0_at_the_fixed_rank_is_tsv_merge(shape):
    matrices, rank = tasks_of("power 0.3", shape, 3), fixed_rank(shape, 3)
    got = weighted_merge(matrices, [1.0, 0.5, 2.0], power=0, ranks=rank)
    assert relative_error(got.matrix, tsv_merge(matrices, rank, [1.0, 0.5, 2.0]).matrix) < 1e-6


@pytest.mark.parametrize("power", [0.0, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("condition", [1e2, 1e3, 1e4])
@pytest.mark.parametrize("shape", [(150, 150), (300, 120)], ids=str)
def test_ill_conditioned_tasks(power, condition, shape):
    matrices, n = [], shape[1]
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        U, V = (
            torch.linalg.qr(torch.randn(size, n, generator=generator, dtype=torch.float64)).Q for size in (shape[0], n)
        )
        values = torch.logspace(0, -np.log10(condition), n, dtype=torch.float64)
        matrices.append(((U * values) @ V.mT).float())
    got = weighted_merge(matrices, power=power)
    assert relative_error(got.matrix, exact(matrices, [1.0] * 3, power)) <= got.certificate.error <= 1e-4


@pytest.mark.parametrize("shape", [(60, 60), (90, 40)], ids=str)
@pytest.mark.parametrize("power", [0.5, 1.0])
def test_directions_shared_by_tasks(shape, power):
    """Nearly parallel directions are pulled apart: the Gram matrices are ill-conditioned, whatever the spectra are."""
    matrices = tasks_of("power 0.5", shape, 3)
    matrices[1] = matrices[0] + 1e-3 * matrices[1]
    got = weighted_merge(matrices, power=power)
    assert relative_error(got.matrix, exact(matrices, [1.0] * 3, power)) <= got.certificate.error <= 1e-4


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
class TestLaws:
    def test_one_task_is_kept(self, shape, power):
        (task,) = tasks_of("power 0.7", shape, 1)
        got = weighted_merge([task], [2.0], power=power)
        assert torch.equal(got.matrix, 2 * task)
        assert got.retained == (1.0,)

    def test_equal_tasks_are_kept(self, shape, power):
        (task,) = tasks_of("power 0.7", shape, 1)
        got = weighted_merge([task] * 4, power=power)
        assert relative_error(got.matrix, task.double()) < 2e-6
        assert got.retained == pytest.approx([1.0] * 4, abs=1e-6)

    def test_a_zero_task_drops_out(self, shape, power):
        first, second = tasks_of("power 0.7", shape, 2)
        got = weighted_merge([first, torch.zeros(shape), second], power=power)
        assert torch.equal(got.matrix, weighted_merge([first, second], power=power).matrix)
        assert got.ranks[1] == 0

    def test_opposite_tasks_cancel(self, shape, power):
        (task,) = tasks_of("power 0.7", shape, 1)
        got = weighted_merge([task, -task], power=power)
        assert got.matrix.norm() < 1e-6 * task.norm()
        assert got.certificate.met

    def test_disjoint_tasks_are_kept(self, shape, power):
        (m, n), parts = shape, tasks_of("power 0.3", shape, 2)
        matrices = [torch.zeros(2 * m, 2 * n) for _ in parts]
        matrices[0][:m, :n], matrices[1][m:, n:] = parts
        got = weighted_merge(matrices, [1.0, 3.0], power=power)
        assert relative_error(got.matrix, (matrices[0] + 3 * matrices[1]).double()) < 1e-6

    def test_order_scale_and_transposition(self, shape, power):
        matrices, weights = tasks_of("power 0.5", shape, 3), [1.0, 0.5, 2.0]
        once = weighted_merge(matrices, weights, power=power)
        turned = weighted_merge(matrices[::-1], weights[::-1], power=power)
        assert relative_error(turned.matrix, once.matrix.double()) < 1e-6
        assert turned.retained == pytest.approx(once.retained[::-1], rel=1e-5)
        for factor in (2.0**-100, 2.0**100):
            scaled = weighted_merge([factor * matrix for matrix in matrices], weights, power=power)
            assert relative_error(scaled.matrix / factor, once.matrix.double()) < 1e-6
        flat = weighted_merge([matrix.mT for matrix in matrices], weights, power=power)
        assert relative_error(flat.matrix.mT, once.matrix.double()) < 1e-6

    def test_linear_in_the_weights(self, shape, power):
        matrices = tasks_of("power 0.5", shape, 3)
        single = [weighted_merge(matrices, [float(s == t) for s in range(3)], power=power) for t in range(3)]
        both = weighted_merge(matrices, [2.0, 0.0, -0.7], power=power)
        assert relative_error(both.matrix, (2 * single[0].matrix - 0.7 * single[2].matrix).double()) < 2e-6
        assert all(found.retained == pytest.approx(both.retained, rel=1e-5) for found in single)

    def test_untouched_rows_and_columns_stay_zero(self, shape, power):
        matrices = tasks_of("power 0.5", shape, 3)
        for matrix in matrices:
            matrix[5], matrix[:, 7] = 0, 0
        got = weighted_merge(matrices, power=power).matrix
        assert not got[5].any()
        assert not got[:, 7].any()
        rows, columns = (
            [index for index in range(size) if index != gone] for size, gone in zip(shape, (5, 7), strict=True)
        )
        smaller = weighted_merge([matrix[rows][:, columns] for matrix in matrices], power=power)
        assert torch.equal(got[rows][:, columns], smaller.matrix)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_retained(shape):
    matrices = tasks_of("power 0.5", shape, 3)
    merged = exact(matrices, [1.0] * 3, 1.0)
    expected = [float((merged * matrix.double().numpy()).sum() / matrix.double().norm() ** 2) for matrix in matrices]
    for weights in (1.0, [1.0, 2.0, 0.5], [0.0, 0.0, 0.0]):
        assert weighted_merge(matrices, weights).retained == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("tasks", [1, 2, 5, 16, 64])
@pytest.mark.parametrize("shape", [(24, 24), (50, 20)], ids=str)
def test_numbers_of_tasks(tasks, shape):
    matrices = tasks_of("power 0.5", shape, tasks)
    got = weighted_merge(matrices)
    assert relative_error(got.matrix, exact(matrices, [1.0] * tasks, 1.0)) <= got.certificate.error <= 1e-5


@settings(max_examples=30)
@given(
    st.integers(1, 12), st.integers(1, 12), st.integers(1, 4), st.sampled_from([0.0, 0.3, 1.0, 2.0]), st.integers(0, 9)
)
def test_small_matrices_of_any_rank(m, n, tasks, power, seed):
    generator = torch.Generator().manual_seed(seed)
    rank = 1 + seed % 3
    matrices = [
        torch.randn(m, rank, generator=generator) @ torch.randn(rank, n, generator=generator) for _ in range(tasks)
    ]
    got = weighted_merge(matrices, power=power)
    assert got.certificate.met
    if tasks > 1 and not got.certificate.arbitrary:
        assert relative_error(got.matrix, exact(matrices, [1.0] * tasks, power)) <= max(got.certificate.error, 1e-5)


@pytest.mark.parametrize(
    ("shape", "inner", "tasks"), [((60, 50), 4, 3), ((200, 50), 8, 3), ((50, 200), 20, 4), ((40, 40), 30, 3)]
)
@pytest.mark.parametrize("power", [0.5, 1.0])
def test_factors_give_what_their_products_give(shape, inner, tasks, power):
    generator = torch.Generator().manual_seed(0)
    factors = [
        Factored(
            torch.randn(shape[0], inner, generator=generator), torch.randn(inner, shape[1], generator=generator), 0.5
        )
        for _ in range(tasks)
    ]
    factors[0].left[3] = factors[1].left[3] = factors[2].left[3] = factors[-1].left[3] = 0
    weights = [1.0 + t for t in range(tasks)]
    got = weighted_merge(factors, weights, power=power)
    products = [factor.scale * factor.left.double() @ factor.right.double() for factor in factors]
    expected = weighted_merge(products, weights, power=power)
    assert relative_error(got.matrix, expected.matrix) <= got.certificate.error <= 1e-5
    assert got.retained == pytest.approx(expected.retained, rel=1e-5)
    assert not got.matrix[3].any()
    assert got.matrix.dtype == torch.float32


def test_row_tiles_give_the_same_merge():
    matrices = tasks_of("power 0.3", (900, 40), 3)
    whole = weighted_merge(matrices, [1.0, 2.0, 0.5])
    tiled = weighted_merge(matrices, [1.0, 2.0, 0.5], workspace=2 * 8 * 40 * 256)
    assert relative_error(tiled.matrix, whole.matrix.double()) < 1e-6
    assert tiled.retained == pytest.approx(whole.retained, rel=1e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float64_stays_accurate(shape):
    matrices = [matrix.double() for matrix in tasks_of("power 0.5", shape, 3)]
    copies = [matrix.clone() for matrix in matrices]
    got = weighted_merge(matrices)
    assert got.matrix.dtype == torch.float64
    assert all(map(torch.equal, matrices, copies))
    assert relative_error(got.matrix, exact(matrices, [1.0] * 3, 1.0)) <= got.certificate.error < 1e-9


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (([torch.ones(3, 4), torch.ones(4, 3)],), {}, ShapeError, "one shape"),
        (([torch.ones(3, 4).half()] * 2,), {}, DTypeError, "float32"),
        (([torch.ones(3, 4)] * 2,), {"power": -1.0}, ConfigError, "power must be >= 0"),
        (([torch.ones(3, 4)] * 2,), {"power": "one"}, ConfigError, "finite number"),
        (([torch.ones(3, 4)] * 2, [1.0]), {}, ShapeError, "2 matrices, 1 weights"),
        (([torch.ones(3, 4)] * 2,), {"mode": "slow"}, ConfigError, "mode"),
        (([torch.full((3, 4), float("nan"))] * 2,), {}, NonFiniteError, "NaN"),
        (([torch.full((3, 4), 1e38)] * 2, 1e30), {}, NonFiniteError, "overflows"),
    ],
)
def test_bad_arguments(arguments, options, error, message):
    with pytest.raises(error, match=message):
        weighted_merge(*arguments, **options)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("shape", [(500, 300), (150, 900), (40, 30)], ids=str)
def test_spectral_norm(kind, shape):
    matrix = spectrum(kind, *shape, 0)
    expected = float(torch.linalg.matrix_norm(matrix.double(), 2))
    assert spectral_norm(matrix) == pytest.approx(expected, rel=1e-5)
    assert spectral_norm(matrix * 1e-30) == pytest.approx(expected * 1e-30, rel=1e-5)
    half = matrix.bfloat16()
    assert spectral_norm(half) == pytest.approx(float(torch.linalg.matrix_norm(half.double(), 2)), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rank", [1, 3, 8, 12])
def test_spectral_norm_of_low_rank(rank, dtype):
    """The Krylov space has fewer dimensions than vectors."""
    generator = torch.Generator().manual_seed(rank)
    left, right = (torch.randn(size, rank, generator=generator, dtype=torch.float64) for size in (600, 400))
    matrix = (left @ right.mT).to(dtype)
    expected = float(torch.linalg.matrix_norm(matrix.double(), 2))
    assert spectral_norm(matrix) == pytest.approx(expected, rel=1e-6)
    two = torch.zeros(300, 300, dtype=dtype)
    two[5, 7], two[8, 9] = 3, 2.999
    assert spectral_norm(two) == pytest.approx(3, rel=1e-6)


def test_spectral_norm_of_products_and_nothing():
    factor = Factored(torch.randn(30, 3), torch.randn(3, 20), 0.5)
    assert spectral_norm(factor) == pytest.approx(float(torch.linalg.matrix_norm(factor.dense().double(), 2)), rel=1e-6)
    assert spectral_norm(torch.zeros(30, 20)) == spectral_norm(torch.zeros(0, 3)) == 0.0
    with pytest.raises(ShapeError, match="expected a matrix"):
        spectral_norm(torch.zeros(3))
