import math

import numpy as np
import oracle
import pytest
import torch
from compare import same_bits
from hypothesis import given
from hypothesis import strategies as st

from r_tsvm_kernels.errors import ConfigError, ShapeError
from r_tsvm_kernels.ops import outlier_weights, reweight_prune, task_statistics


def prepare(base, tuned, weighting="clip", density=1.0, sigma=3.0):
    return reweight_prune(base, tuned, task_statistics(base, tuned, sigma), weighting, density)


def heavy(shape=(40, 30)):
    return torch.randn(shape) ** 5 * 1e-3


def test_without_clipping_and_pruning_it_is_the_task_vector():
    base, tuned = torch.randn(5, 7, dtype=torch.bfloat16), [torch.randn(5, 7) for _ in range(2)]
    for got, t in zip(prepare(base, tuned, "none"), tuned, strict=True):
        assert got.dtype == torch.float32
        assert same_bits(got, t - base.float())


@pytest.mark.parametrize("weighting", ["clip", "none", "damp", "boost"])
@pytest.mark.parametrize("density", [1.0, 0.3, 0.01, 0.0])
def test_equals_the_formula(weighting, density):
    base, tuned = torch.zeros(40, 30), [heavy(), heavy()]
    for got, t in zip(prepare(base, tuned, weighting, density), tuned, strict=True):
        expected = t.double().numpy()
        magnitude = np.abs(expected)
        if weighting == "clip":
            theta = np.float32(magnitude.mean() + 3 * magnitude.std())
            expected = np.clip(expected, -theta, theta)
        expected = oracle.keep_largest(expected, density)
        assert np.array_equal(got.double().numpy(), expected)
        assert int((got != 0).sum()) == math.ceil(density * got.numel())


def test_infinite_sigma_clips_nothing():
    base, tuned = torch.zeros(40, 30), [heavy()]
    assert same_bits(prepare(base, tuned, "clip", sigma=math.inf)[0], tuned[0])


def test_one_density_per_task():
    base, tuned = torch.zeros(10, 10), [torch.randn(10, 10) for _ in range(2)]
    assert [int((d != 0).sum()) for d in prepare(base, tuned, density=[0.2, 0.7])] == [20, 70]
    with pytest.raises(ConfigError, match="2 tasks but 3 densities"):
        prepare(base, tuned, density=[0.1, 0.2, 0.3])


def test_inputs_are_left_alone():
    base, tuned = torch.randn(6, 6), [torch.randn(6, 6)]
    copies = base.clone(), tuned[0].clone()
    prepare(base, tuned, density=0.5)
    assert same_bits(base, copies[0]) and same_bits(tuned[0], copies[1])


def test_what_it_refuses():
    base = torch.zeros(3, 3)
    with pytest.raises(ConfigError, match="outlier_weighting"):
        prepare(base, [base], "squash")
    with pytest.raises(ShapeError, match=r"tuned\[1\]"):
        reweight_prune(base, [base, torch.zeros(3, 4)], task_statistics(base, [base]))
    with pytest.raises(ShapeError, match="at least one"):
        reweight_prune(base, [], task_statistics(base, [base]))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.sampled_from(["clip", "damp", "boost", "none"]))
def test_outlier_weights_have_mean_one(masses, weighting):
    statistics = task_statistics(torch.zeros(1), [torch.zeros(1)] * len(masses))
    statistics.outlier_mass.copy_(torch.tensor(masses, dtype=torch.float64))
    weights = outlier_weights(statistics, weighting)
    assert sum(weights) == pytest.approx(len(masses))
    assert min(weights) >= 0


def test_outlier_weights_by_hand():
    statistics = task_statistics(torch.zeros(1), [torch.zeros(1)] * 2)
    statistics.outlier_mass.copy_(torch.tensor([0.1, 0.3], dtype=torch.float64))
    assert outlier_weights(statistics, "damp") == pytest.approx([2 * 0.9 / 1.6, 2 * 0.7 / 1.6])
    assert outlier_weights(statistics, "boost") == pytest.approx([0.5, 1.5])
    assert outlier_weights(statistics, "clip") == [1.0, 1.0]


def test_degenerate_outlier_masses_give_one():
    statistics = task_statistics(torch.zeros(1), [torch.zeros(1)] * 3)
    assert outlier_weights(statistics, "boost") == [1.0, 1.0, 1.0]
    statistics.outlier_mass.fill_(1.0)
    assert outlier_weights(statistics, "damp") == [1.0, 1.0, 1.0]
