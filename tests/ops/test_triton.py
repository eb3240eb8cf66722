"""The Triton kernels for statistics, update, selection and pruning against the references, in the interpreter."""

import math

import pytest
import torch
from compare import same_bits
from interpreted import TINY, every_dtype, every_mix, interpreted, nasty, pair, small_blocks

from r_tsvm_kernels.errors import NonFiniteError
from r_tsvm_kernels.ops import reweight_prune, task_statistics

pytestmark = [*interpreted, pytest.mark.usefixtures(small_blocks.__name__)]

SIZES = [1, 2, 128, 129, 500]


# --- task_statistics


def assert_statistics(base, tuned, sigma=3.0, eps=0.1):
    got = task_statistics(base, tuned, sigma=sigma, eps=eps, backend="triton")
    expected = task_statistics(base, tuned, sigma=sigma, eps=eps, backend="torch")
    assert got.numel == expected.numel
    for field in ("mean", "sd", "max", "theta", "outlier_mass", "zeros", "small"):
        torch.testing.assert_close(
            getattr(got, field), getattr(expected, field), rtol=1e-12, atol=0, equal_nan=True, msg=field
        )
    assert torch.equal(got.zeros, expected.zeros) and torch.equal(got.small, expected.small)
    return got


@every_mix
@pytest.mark.parametrize("size", [1, 129, 500])
def test_statistics(mix, size):
    assert_statistics(*pair((size,), mix, tasks=3))


@pytest.mark.parametrize("sigma", [0.0, 0.5, math.inf])
@pytest.mark.parametrize("eps", [0.0, 1.0, 5.0])
def test_statistics_for_other_thresholds(sigma, eps):
    assert_statistics(*pair((17, 31)), sigma, eps)


@pytest.mark.parametrize("shape", [(0,), (3, 0, 5), (), (1, 1)])
@pytest.mark.parametrize("sigma", [3.0, math.inf])
def test_statistics_of_nothing_and_one_element(shape, sigma):
    assert_statistics(*pair(shape), sigma)


def test_statistics_of_zeros_and_equal_magnitudes():
    base = torch.zeros(300, dtype=torch.bfloat16)
    got = assert_statistics(base, [base.clone(), -base])
    assert got.zeros.tolist() == got.small.tolist() == [300, 300]
    got = task_statistics(torch.zeros(300), [torch.full((300,), -0.1)], backend="triton")
    assert 0 <= got.sd[0] <= 1e-14 and got.zeros[0] == got.small[0] == 0


def test_statistics_of_subnormals():
    steps = torch.arange(-250, 250).double()
    for dtype in (torch.float16, torch.float32, torch.bfloat16):
        assert_statistics(torch.zeros(500, dtype=dtype), [(steps % 120 * TINY[dtype]).to(dtype)], sigma=1.0)


def test_thresholds_are_not_rounded_to_float32():
    tuned = torch.ones(5000)
    tuned[77] = 1 - 2.0**-24
    got = task_statistics(torch.zeros(5000), [tuned], sigma=0.0, eps=1.0, backend="triton")
    assert got.small[0] == 1 and got.outlier_mass[0] > 0.999


@pytest.mark.parametrize("sigma", [3.0, 0.0, math.inf])
@pytest.mark.parametrize("eps", [0.1, 0.0])
def test_statistics_of_nan_and_infinity(sigma, eps):
    base, tuned = pair((300,), tasks=5)
    tuned[0][171] = math.nan
    tuned[1][17] = -math.inf
    tuned[2][17], tuned[2][299] = math.inf, math.nan
    tuned[4][:] = math.nan
    assert_statistics(base, tuned, sigma, eps)


def test_statistics_that_overflow():
    base = torch.zeros(200, dtype=torch.float64)
    got = task_statistics(base, [base + 1e307], backend="triton")
    assert (got.mean[0], got.max[0], got.sd[0]) == (math.inf, 1e307, math.inf)


def test_statistics_of_views():
    base, tuned = torch.randn(31, 40)[:, ::2], [torch.randn(20, 31).mT]
    got, dense = (
        task_statistics(b, t, backend="triton")
        for b, t in [(base, tuned), (base.contiguous(), [tuned[0].contiguous()])]
    )
    assert same_bits(got.mean, dense.mean) and same_bits(got.sd, dense.sd)


# --- reweight_prune


def assert_pruned(base, tuned, density, name=""):
    statistics = task_statistics(base, tuned, sigma=1.0)
    for weighting in ("clip", "none"):
        got, expected = (
            reweight_prune(base, tuned, statistics, outlier_weighting=weighting, density=density, backend=backend)
            for backend in ("triton", "torch")
        )
        assert len(got) == len(expected) == len(tuned)
        for g, e in zip(got, expected, strict=True):
            assert same_bits(g, e), (name, weighting, density)


@every_mix
@pytest.mark.parametrize("density", [1.0, 0.3, 0.0])
def test_pruning(mix, density):
    assert_pruned(*pair((257,), mix), density)


@every_dtype
def test_pruning_of_nasty_values(dtype, density=0.4):
    for name, x in nasty(dtype):
        zero = torch.zeros_like(x)
        if name != "largest":  # its differences overflow
            assert_pruned(x, [x.flip(0)], density, name)
        assert_pruned(-zero, [x], density, name)


def test_many_clipped_elements_tie():
    base = torch.zeros(400)
    tuned = [torch.where(torch.rand(400) < 0.5, torch.randn(400), torch.randn(400).sign() * 5)]
    for density in (0.05, 0.3, 0.7):
        assert_pruned(base, tuned, density)


@pytest.mark.parametrize("shape", [(0,), (3, 0), (), (1, 1), (13, 29)])
def test_pruning_of_shapes(shape):
    assert_pruned(*pair(shape), [0.5, 1.0])


def test_pruning_of_views():
    base, tuned = torch.randn(12, 30)[:, ::2], torch.randn(15, 12).mT
    statistics = task_statistics(base, [tuned])
    got, expected = (
        reweight_prune(base, [tuned], statistics, density=0.4, backend=backend)[0] for backend in ("triton", "torch")
    )
    assert torch.equal(got, expected) and got.is_contiguous()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_nan_and_infinity_are_refused_where_something_is_pruned(bad, dtype):
    base, tuned = pair((100,), (dtype, dtype))
    tuned[1][50] = bad
    statistics = task_statistics(base, tuned)
    for density, weighting in [(0.5, "clip"), (0.0, "none")]:
        with pytest.raises(NonFiniteError, match="NaN or infinite"):
            reweight_prune(base, tuned, statistics, outlier_weighting=weighting, density=density, backend="triton")
    reweight_prune(base, tuned, statistics, outlier_weighting="none", density=[0.5, 1.0], backend="triton")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_come_through_where_nothing_is_pruned(bad):
    base, tuned = pair((200,))
    tuned[1][150] = bad
    for sigma in (3.0, math.inf):
        statistics = task_statistics(base, tuned, sigma=sigma)
        for weighting in ("clip", "none"):
            got, expected = (
                reweight_prune(base, tuned, statistics, outlier_weighting=weighting, backend=backend)
                for backend in ("triton", "torch")
            )
            for g, e in zip(got, expected, strict=True):
                assert torch.equal(g.isnan(), e.isnan()) and same_bits(g.nan_to_num(), e.nan_to_num())


# --- reweight_prune_
