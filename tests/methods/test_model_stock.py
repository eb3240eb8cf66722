from itertools import combinations

import numpy as np
import pytest
import torch
from compare import relative_error, same_bits
from hypothesis import given
from hypothesis import strategies as st
from merging import DTYPES, SHAPES, doubles, group, merge, update_error

from r_tsvm_kernels.ops import _checks


def ratio(deltas):
    """Jang et al., section 4: t from the angle between the fine-tunes as seen from the base."""
    tasks = len(deltas)
    if tasks == 1:
        return 1.0
    pairs = [(np.vdot(a, b), np.linalg.norm(a) * np.linalg.norm(b)) for a, b in combinations(deltas, 2)]
    cosine = max(0.0, np.mean([product / norms if norms else 0.0 for product, norms in pairs]))
    return tasks * cosine / (1 + (tasks - 1) * cosine)


def truth(base, tuned, filter_wise=False, weights=None):
    deltas = [t - base for t in tuned]
    mean = np.average(deltas, axis=0, weights=weights)
    if not filter_wise or base.ndim < 2:
        return base + ratio(deltas) * mean
    ratios = np.array([ratio([d[index] for d in deltas]) for index in np.ndindex(base.shape[:-1])])
    return base + ratios.reshape(*base.shape[:-1], 1) * mean


def related(shape=(24, 17), tasks=3, dtype=torch.float32, seed=0):
    """Fine-tunes with something in common."""
    base, tuned = group(shape, tasks, torch.float32, seed)
    shared = 0.05 * torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1000))
    return base.to(dtype), [(t + shared).to(dtype) for t in tuned]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tasks", [1, 2, 3, 8])
@pytest.mark.parametrize("filter_wise", [False, True])
def test_equals_float64(shape, dtype, tasks, filter_wise):
    base, tuned = related(shape, tasks, dtype)
    got = merge("model_stock", base, tuned, filter_wise=filter_wise)
    assert update_error(got, base, truth(*doubles(base, tuned), filter_wise)) < 1e-5


def test_weights_weight_the_mean():
    base, tuned = related()
    got = merge("model_stock", base, tuned, weights=[1.0, 2.0, 3.0])
    assert update_error(got, base, truth(*doubles(base, tuned), weights=[1, 2, 3])) < 1e-6


def test_many_tiles(monkeypatch):
    base, tuned = related((40, 33))
    plain = [merge("model_stock", base, tuned, filter_wise=rows) for rows in (False, True)]
    monkeypatch.setitem(_checks.TILE, "cpu", 50)
    for rows in (False, True):
        assert relative_error(merge("model_stock", base, tuned, filter_wise=rows), plain[rows]) < 1e-7


@pytest.mark.parametrize("filter_wise", [False, True])
def test_opposite_fine_tunes_give_the_base(filter_wise):
    # mergekit divides by 1 + cos = 0 here, and the tensor becomes NaN.
    base, (tuned,) = group(tasks=1)
    away = 2 * base - tuned
    got = merge("model_stock", base.double(), [tuned.double(), away.double()], filter_wise=filter_wise)
    assert relative_error(got, base) < 1e-7


def test_a_model_that_did_not_touch_the_tensor_has_no_angle():
    base, tuned = related(tasks=2)
    got = merge("model_stock", base, [*tuned, base])
    assert update_error(got, base, truth(*doubles(base, [*tuned, base]))) < 1e-6


@pytest.mark.parametrize("filter_wise", [False, True])
def test_untouched_tensors_stay(filter_wise):
    base, _ = group()
    base[0, 0] = -0.0
    assert same_bits(merge("model_stock", base, [base, base], filter_wise=filter_wise), base)


@given(st.integers(1, 6), st.booleans(), st.integers(0, 9))
def test_equal_fine_tunes_are_their_own_stock(tasks, filter_wise, seed):
    base, tuned = group((7, 9), 1, seed=seed)
    assert relative_error(merge("model_stock", base, tuned * tasks, filter_wise=filter_wise), tuned[0]) < 1e-6


@given(st.permutations(range(3)), st.booleans(), st.integers(0, 9))
def test_the_order_of_tasks_does_not_matter(order, filter_wise, seed):
    base, tuned = related((9, 13), seed=seed)
    plain = merge("model_stock", base, tuned, filter_wise=filter_wise)
    assert relative_error(merge("model_stock", base, [tuned[i] for i in order], filter_wise=filter_wise), plain) < 1e-6


@given(st.sampled_from([2.0**-40, 0.25, 8.0, -1.0]), st.booleans(), st.integers(0, 9))
def test_scaling_the_task_vectors_scales_the_update(c, filter_wise, seed):
    # mergekit takes norms whose product is below 1e-6 for 1e-6: small updates become smaller.
    base = torch.zeros(9, 13)
    start, tuned = related((9, 13), seed=seed)
    deltas = [t - start for t in tuned]
    plain = merge("model_stock", base, deltas, filter_wise=filter_wise)
    got = merge("model_stock", base, [c * d for d in deltas], filter_wise=filter_wise)
    assert relative_error(got, c * plain) < 1e-6
    assert plain.norm() > 0
