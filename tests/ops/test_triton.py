"""The Triton kernels for statistics, update, selection and pruning against the references, in the interpreter."""

import math

import pytest
import torch
from compare import same_bits
from interpreted import every_dtype, every_mix, interpreted, nasty, pair, small_blocks

from r_tsvm_kernels.errors import NonFiniteError
from r_tsvm_kernels.ops import reweight_prune, task_statistics

pytestmark = [*interpreted, pytest.mark.usefixtures(small_blocks.__name__)]

SIZES = [1, 2, 128, 129, 500]


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
