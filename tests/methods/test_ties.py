import math
from fractions import Fraction

import numpy as np
import oracle
import pytest
import torch
from compare import relative_error, same_bits
from hypothesis import given
from hypothesis import strategies as st
from merging import DTYPES, SHAPES, doubles, group, merge, update_error

from r_tsvm_kernels import MergeConfig, merge_tensors


def truth(base, tuned, density=1.0, weights=None, alpha=1.0, normalize=True, rescale=False):
    """Yadav et al., section 4: trim, elect, disjoint mean; with weights."""
    deltas = [t - base for t in tuned]
    kept = [oracle.keep_largest(d, density) for d in deltas]
    if rescale:
        kept = [k * np.abs(d).sum() / np.abs(k).sum() for k, d in zip(kept, deltas, strict=True)]
    return oracle.vote_and_sum(base, kept, weights or [1.0] * len(tuned), alpha, elect=True, normalize=normalize)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tasks", [1, 2, 3, 8])
def test_equals_float64(shape, dtype, tasks):
    base, tuned = group(shape, tasks, dtype)
    for density in (0.2, 0.5, 1.0):
        got = merge("ties", base, tuned, density=density)
        assert update_error(got, base, truth(*doubles(base, tuned), density)) < 1e-5


@pytest.mark.parametrize(
    "options",
    [
        {"normalize": False},
        {"alpha": 0.3},
        {"weights": [0.5, -1.0, 2.0]},
        {"weights": [0.5, 1.5, 2.0], "normalize": False},
        {"rescale": True},
    ],
    ids=str,
)
def test_options_equal_float64(options):
    base, tuned = group((31, 22))
    got = merge("ties", base, tuned, density=0.4, **options)
    assert update_error(got, base, truth(*doubles(base, tuned), 0.4, **options)) < 1e-6


def test_densities_of_their_own():
    base, tuned = group(tasks=2)
    models = ({"parameters": {"density": 0.1}}, {"parameters": {"density": 0.9}})
    got = merge_tensors(base, tuned, MergeConfig(merge_method="ties", models=models)).weight
    exact_base, exact = doubles(base, tuned)
    kept = [oracle.keep_largest(t - exact_base, d) for t, d in zip(exact, (0.1, 0.9), strict=True)]
    exact = oracle.vote_and_sum(exact_base, kept, [1, 1], elect=True, normalize=True)
    assert update_error(got, base, exact) < 1e-5


def test_keeps_what_a_scalar_has():
    # mergekit rounds the number of kept elements down and stops at an assertion here.
    assert merge("ties", torch.tensor(1.0), [torch.tensor(3.0)], density=0.3) == 3.0


def test_of_equal_magnitudes_the_first_are_kept():
    # mergekit keeps any of them.
    base, tuned = torch.zeros(8), [torch.full((8,), 0.5)]
    assert merge("ties", base, tuned, density=0.5).tolist() == [0.5] * 4 + [0.0] * 4


def test_untouched_tensors_stay():
    base, _ = group()
    base[0, 0] = -0.0
    assert same_bits(merge("ties", base, [base, base], density=0.3), base)


def test_nothing_is_kept_at_density_0():
    base, tuned = group()
    assert same_bits(merge("ties", base, tuned, density=0.0), base)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 9))
def test_one_whole_task_is_the_fine_tune(m, n, seed):
    base, tuned = group((m, n), 1, seed=seed)
    assert relative_error(merge("ties", base, tuned), tuned[0]) < 1e-6


@given(st.permutations(range(3)), st.floats(0.1, 1), st.integers(0, 9))
def test_the_order_of_tasks_does_not_matter(order, density, seed):
    base, tuned = group((9, 13), seed=seed)
    weights = [0.5, 1.0, 1.5]
    plain = merge("ties", base, tuned, weights=weights, density=density)
    got = merge("ties", base, [tuned[i] for i in order], weights=[weights[i] for i in order], density=density)
    assert relative_error(got, plain) < 1e-6


@given(st.sampled_from([2.0**-40, 0.25, 8.0]), st.booleans(), st.integers(0, 9))
def test_scaling_the_task_vectors_scales_the_update(c, rescale, seed):
    # Negative factors turn the sign where all votes cancel; mergekit's L1 rescaling gives up at norms below 1e-7.
    base = torch.zeros(9, 13)
    _, tuned = group((9, 13), seed=seed)
    plain = merge("ties", base, tuned, density=0.4, rescale=rescale)
    assert relative_error(merge("ties", base, [c * t for t in tuned], density=0.4, rescale=rescale), c * plain) < 1e-6


@given(st.floats(0, 1), st.integers(1, 50))
def test_exactly_the_density_is_kept(density, n):
    base, tuned = torch.zeros(n), [torch.randn(n)]
    kept = int((merge("ties", base, tuned, density=density) != 0).sum())
    assert kept == math.ceil(Fraction(str(density)) * n)
