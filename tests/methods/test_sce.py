import math

import numpy as np
import pytest
import torch
from compare import relative_error, same_bits
from hypothesis import given
from hypothesis import strategies as st
from merging import DTYPES, SHAPES, doubles, group, merge, update_error


def truth(base, tuned, select_topk=1.0, weights=None):
    """Wan et al., section 3.3: select by variance, calculate coefficients, erase minority directions."""
    deltas = np.array([t - base for t in tuned])
    variance = deltas.var(0)
    if select_topk < 1 and len(tuned) > 1:
        count = math.ceil(select_topk * np.count_nonzero(variance) - 1e-9)
        selected = np.zeros(base.size, dtype=bool)
        selected[np.argsort(-variance, axis=None, kind="stable")[:count]] = True
        deltas = deltas * selected.reshape(base.shape)
    coefficients = (deltas**2).reshape(len(tuned), -1).mean(1) * (weights or [1.0] * len(tuned))
    if not coefficients.any():
        return base
    coefficients = coefficients / coefficients.sum()
    sign = np.where(deltas.sum(0) >= 0, 1, -1)
    weighted = (np.sign(deltas) == sign) * coefficients.reshape(-1, *[1] * base.ndim)
    divisor = weighted.sum(0)
    return base + (weighted * deltas).sum(0) / np.where(divisor == 0, 1, divisor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tasks", [1, 2, 3, 8])
def test_equals_float64(shape, dtype, tasks):
    base, tuned = group(shape, tasks, dtype)
    for share in (0.0, 0.1, 0.6, 1.0):
        got = merge("sce", base, tuned, select_topk=share)
        assert update_error(got, base, truth(*doubles(base, tuned), share)) < 1e-5


def test_weights_multiply_the_coefficients():
    base, tuned = group()
    got = merge("sce", base, tuned, weights=[1.0, 2.0, 0.5], select_topk=0.5)
    assert update_error(got, base, truth(*doubles(base, tuned), 0.5, weights=[1, 2, 0.5])) < 1e-6


def test_updates_as_small_as_those_of_real_fine_tunes_are_weighted():
    # mergekit weights all tasks alike where the mean squares sum to less than 1e-6: at updates of about 1e-3.
    base = torch.zeros(20, 30)
    tuned = [1e-5 * torch.randn(20, 30), 3e-5 * torch.randn(20, 30)]
    got = merge("sce", base, tuned)
    assert update_error(got, base, truth(*doubles(base, tuned))) < 1e-6
    alike = truth(*doubles(base, tuned), weights=[9.0, 1.0])
    assert relative_error(got, alike) > 0.01


def test_of_equal_variances_the_first_are_selected():
    base, tuned = torch.zeros(6), [torch.ones(6), torch.full((6,), 3.0)]
    got = merge("sce", base, tuned, select_topk=0.5)
    assert relative_error(got, [2.8] * 3 + [0.0] * 3) < 1e-6  # (1 * 1 + 9 * 3) / 10


def test_elements_on_which_all_agree_are_not_counted():
    base, first = torch.zeros(8), torch.arange(1.0, 9.0)
    second = first.clone()
    second[:4] += 1
    got = merge("sce", base, [first, second], select_topk=0.5)
    assert got[:2].abs().sum() > 0 and int((got != 0).sum()) == 2


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_untouched_tensors_stay(share):
    base, _ = group()
    base[0, 0] = -0.0
    assert same_bits(merge("sce", base, [base, base], select_topk=share), base)


@given(st.integers(1, 20), st.sampled_from([0.2, 1.0]), st.integers(0, 9))
def test_one_task_is_the_fine_tune(n, share, seed):
    # mergekit selects nothing at all here where select_topk < 1.
    base, tuned = group((n, 7), 1, seed=seed)
    assert relative_error(merge("sce", base, tuned, select_topk=share), tuned[0]) < 1e-6


@given(st.permutations(range(3)), st.floats(0.1, 1), st.integers(0, 9))
def test_the_order_of_tasks_does_not_matter(order, share, seed):
    base, tuned = group((9, 13), seed=seed)
    weights = [0.5, 1.0, 1.5]
    plain = merge("sce", base, tuned, weights=weights, select_topk=share)
    got = merge("sce", base, [tuned[i] for i in order], weights=[weights[i] for i in order], select_topk=share)
    assert relative_error(got, plain) < 1e-6


@given(st.sampled_from([2.0**-40, 0.25, 8.0]), st.floats(0.1, 1), st.integers(0, 9))
def test_scaling_the_task_vectors_scales_the_update(c, share, seed):
    base = torch.zeros(9, 13)
    _, tuned = group((9, 13), seed=seed)
    plain = merge("sce", base, tuned, select_topk=share)
    assert relative_error(merge("sce", base, [c * t for t in tuned], select_topk=share), c * plain) < 1e-6
