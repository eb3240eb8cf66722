import numpy as np
import oracle
import pytest
import torch
from compare import relative_error, same_bits
from hypothesis import given
from hypothesis import strategies as st
from merging import DTYPES, SHAPES, doubles, drawn, group, merge, update_error

from r_tsvm_kernels import ConfigError, MergeConfig

BOTH = pytest.mark.parametrize("method", ["della_linear", "della"])


def survivors(shape, probabilities, seed, task, name="w"):
    """Mask of elements whose word is below their own probability: one mask per probability."""
    mask = np.zeros(shape, dtype=bool)
    for p in np.unique(probabilities):
        mask |= (probabilities == p) & drawn(shape, min(1.0, max(0.0, p)), seed, task, name)
    return mask


def truth(
    method, base, tuned, density=1.0, epsilon=0.15, weights=None, alpha=1.0, normalize=None, rescale=True, seed=0
):
    """Deep et al., section 3: drop by rank, divide by the probability of being kept; elect and fuse."""
    kept = []
    for task, delta in enumerate(t - base for t in tuned):
        if density in (0, 1):
            kept.append(density * delta)
            continue
        p = oracle.della_probabilities(delta, density, epsilon)
        chosen = np.where(survivors(delta.shape, p, seed, task), delta, 0.0)
        kept.append(chosen / p if rescale else chosen)
    elect = method == "della"
    normalize = elect if normalize is None else normalize
    return oracle.vote_and_sum(base, kept, weights or [1.0] * len(tuned), alpha, elect=elect, normalize=normalize)


@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tasks", [1, 3])
def test_equals_float64(method, shape, dtype, tasks):
    base, tuned = group(shape, tasks, dtype)
    for density, epsilon in ((0.0, 0.15), (0.3, 0.1), (0.6, 0.15), (1.0, 0.15)):
        got = merge(method, base, tuned, density=density, epsilon=epsilon)
        assert update_error(got, base, truth(method, *doubles(base, tuned), density, epsilon)) < 1e-5


@BOTH
@pytest.mark.parametrize(
    "options",
    [
        {"normalize": True}, {"normalize": False}, {"alpha": 0.3}, {"weights": [0.5, -1.0, 2.0]}, {"rescale": False},
        {"seed": 7}, {"epsilon": 0.0},
    ],
    ids=str,
)  # fmt: skip
def test_options_equal_float64(method, options):
    base, tuned = group((31, 22))
    got = merge(method, base, tuned, density=0.4, **options)
    assert update_error(got, base, truth(method, *doubles(base, tuned), 0.4, **options)) < 1e-6


def test_columns_of_one_element_are_merged():
    # mergekit divides 0 by 0 here and stops.
    base, tuned = group((40, 1), 2)
    got = merge("della_linear", base, tuned, density=0.5)
    assert got.isfinite().all() and 0 < int((got != base).sum()) < 40


def test_probabilities_out_of_range_are_refused_before_anything_is_read():
    config = MergeConfig("della", density=0.9)
    with pytest.raises(ConfigError, match=r"density \+ epsilon <= 1, got density 0.9, epsilon 0.15"):
        config.options(2)
    MergeConfig("della", density=0.9, epsilon=0.1).options(2)
    MergeConfig("della", density=1.0).options(2)


def test_the_mean_over_seeds_is_task_arithmetic():
    # mergekit scales to the L1 norm of the task vector instead: large elements, kept more often, come out too large.
    base, tuned = group((40, 50), 2)
    seeds = 300
    mean = sum(merge("della_linear", base, tuned, density=0.5, seed=s).double() for s in range(seeds)) / seeds
    exact = merge("task_arithmetic", base, tuned).double()
    assert relative_error(mean - base, exact - base) < 2.5 / seeds**0.5


@BOTH
def test_untouched_tensors_stay(method):
    base, _ = group()
    base[0, 0] = -0.0
    assert same_bits(merge(method, base, [base, base], density=0.3), base)


@given(st.sampled_from(["della_linear", "della"]), st.sampled_from([2.0**-30, 0.25, 8.0]), st.integers(0, 9))
def test_scaling_the_task_vectors_scales_the_update(method, c, seed):
    base = torch.zeros(9, 13)
    _, tuned = group((9, 13), seed=seed)
    plain = merge(method, base, tuned, density=0.4)
    assert relative_error(merge(method, base, [c * t for t in tuned], density=0.4), c * plain) < 1e-6


@given(st.permutations(range(3)), st.integers(0, 9))
def test_the_order_of_tasks_does_not_matter_where_nothing_is_drawn(order, seed):
    base, tuned = group((9, 13), seed=seed)
    for method in ("della_linear", "della"):
        assert relative_error(merge(method, base, [tuned[i] for i in order]), merge(method, base, tuned)) < 1e-6
