import math

import numpy as np
import oracle
import pytest
import torch
from compare import relative_error, same_bits
from hypothesis import given
from hypothesis import strategies as st
from merging import DTYPES, SHAPES, doubles, group, merge, update_error

BOTH = pytest.mark.parametrize("method", ["breadcrumbs", "breadcrumbs_ties"])


def truth(
    method, base, tuned, density=1.0, gamma=0.01, weights=None, alpha=1.0, normalize=False, rescale=False
):  # fmt: skip
    """Davari, Belilovsky, section 3: mask both tails of the magnitudes."""
    kept = []
    for delta in (t - base for t in tuned):
        order = np.argsort(-np.abs(delta), axis=None, kind="stable")
        count = math.ceil(density * delta.size - 1e-9)
        first = min(math.floor(gamma * delta.size + 1e-9), delta.size - count)
        masked = np.zeros_like(delta)
        masked.flat[order[first : first + count]] = delta.flat[order[first : first + count]]
        if rescale:
            masked *= np.abs(delta).sum() / np.abs(masked).sum()
        kept.append(masked)
    elect = method == "breadcrumbs_ties"
    return oracle.vote_and_sum(base, kept, weights or [1.0] * len(tuned), alpha, elect=elect, normalize=normalize)


@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tasks", [1, 3, 8])
def test_equals_float64(method, shape, dtype, tasks):
    base, tuned = group(shape, tasks, dtype)
    for density, gamma in ((0.3, 0.1), (0.5, 0.01), (0.95, 0.2), (1.0, 0.01)):
        got = merge(method, base, tuned, density=density, gamma=gamma)
        assert update_error(got, base, truth(method, *doubles(base, tuned), density, gamma)) < 1e-5


@BOTH
@pytest.mark.parametrize(
    "options",
    [{"normalize": True}, {"alpha": 0.3}, {"weights": [0.5, -1.0, 2.0]}, {"rescale": True}, {"gamma": 0.3}],
    ids=str,
)
def test_options_equal_float64(method, options):
    base, tuned = group((31, 22))
    got = merge(method, base, tuned, density=0.4, **options)
    assert update_error(got, base, truth(method, *doubles(base, tuned), 0.4, **options)) < 1e-6


@BOTH
@pytest.mark.parametrize("numel", [1, 10, 99])
def test_small_tensors_keep_their_share(method, numel):
    # mergekit returns the base here: it cuts "all but the last 0" elements.
    base, tuned = torch.zeros(numel), [torch.randn(numel)]
    assert int((merge(method, base, tuned, density=0.3) != 0).sum()) == math.ceil(0.3 * numel - 1e-9)
    assert int((merge(method, base, tuned, density=0.3, gamma=0.0) != 0).sum()) == math.ceil(0.3 * numel - 1e-9)


def test_the_largest_are_dropped_and_density_counts_first():
    base, tuned = torch.zeros(10), [torch.arange(1.0, 11.0)]
    assert merge("breadcrumbs", base, tuned, density=0.3, gamma=0.2).tolist() == [0] * 5 + [6, 7, 8, 0, 0]
    assert merge("breadcrumbs", base, tuned, density=0.9, gamma=0.2).tolist() == [*range(1, 10), 0]
    assert merge("breadcrumbs", base, tuned, density=1.0, gamma=0.2).tolist() == [*range(1, 11)]


@BOTH
def test_untouched_tensors_stay(method):
    base, _ = group()
    base[0, 0] = -0.0
    assert same_bits(merge(method, base, [base, base], density=0.3), base)


@given(st.permutations(range(3)), st.floats(0.1, 1), st.floats(0, 0.3), st.integers(0, 9))
def test_the_order_of_tasks_does_not_matter(order, density, gamma, seed):
    base, tuned = group((9, 13), seed=seed)
    weights = [0.5, 1.0, 1.5]
    options = {"density": density, "gamma": gamma}
    for method in ("breadcrumbs", "breadcrumbs_ties"):
        plain = merge(method, base, tuned, weights=weights, **options)
        got = merge(method, base, [tuned[i] for i in order], weights=[weights[i] for i in order], **options)
        assert relative_error(got, plain) < 1e-6


@given(st.sampled_from(["breadcrumbs", "breadcrumbs_ties"]), st.sampled_from([2.0**-30, 0.25, 8.0]), st.integers(0, 9))
def test_scaling_the_task_vectors_scales_the_update(method, c, seed):
    base = torch.zeros(9, 13)
    _, tuned = group((9, 13), seed=seed)
    plain = merge(method, base, tuned, density=0.4, gamma=0.1)
    assert relative_error(merge(method, base, [c * t for t in tuned], density=0.4, gamma=0.1), c * plain) < 1e-6
