import numpy as np
import pytest
import torch
from compare import relative_error, same_bits
from hypothesis import given
from hypothesis import strategies as st
from merging import DTYPES, doubles, group, merge, update_error

from r_tsvm_kernels import ConfigError, MergeConfig, merge_tensors

MATRICES = [(24, 17), (17, 24), (30, 30), (1, 7), (5, 1), (3, 40)]


def boosted(total, beta):
    """Skorobogat et al.: singular values after the index of the share are raised to the value there."""
    left, values, right = np.linalg.svd(total, full_matrices=False)
    rank = int((values > 1e-6 * values[0]).sum()) if values.any() else 0
    sums = np.cumsum(values)
    index = next(i for i in range(len(values)) if sums[i] >= beta * sums[-1] * (1 - 1e-14))
    return left[:, :rank] * np.maximum(values, values[index])[:rank] @ right[:rank]


def truth(base, tuned, beta=0.01, alpha=1.0, weights=None):
    weights = weights or [1.0] * len(tuned)
    total = sum(w * (t - base) for w, t in zip(weights, tuned, strict=True))
    return base + alpha * (boosted(total, beta) if base.ndim == 2 else total / len(tuned))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*MATRICES, (61,), (), (3, 5, 7)], ids=str)
@pytest.mark.parametrize("tasks", [1, 3])
def test_equals_float64(shape, dtype, tasks):
    base, tuned = group(shape, tasks, dtype)
    for beta in (0.01, 0.4):
        got = merge("subspace_boosting", base, tuned, boost_beta=beta)
        assert update_error(got, base, truth(*doubles(base, tuned), beta)) < 1e-5


@pytest.mark.parametrize(
    "options",
    [
        {"alpha": 0.3}, {"scaling_factor": 0.3}, {"weights": [0.5, -1.0, 2.0]}, {"boost_beta": 0.0},
        {"boost_beta": 0.9}, {"boost_beta": 1.0}, {"mode": "fast"},
    ],
    ids=str,
)  # fmt: skip
def test_options_equal_float64(options):
    base, tuned = group((31, 22))
    alpha = options.get("alpha", options.get("scaling_factor", 1.0))
    exact = truth(*doubles(base, tuned), options.get("boost_beta", 0.01), alpha, options.get("weights"))
    assert update_error(merge("subspace_boosting", base, tuned, **options), base, exact) < 1e-5


@pytest.mark.parametrize("shape", [(310, 280), (130, 300)], ids=str)
def test_larger_matrices_take_the_gram_route(shape):
    base, tuned = group(shape, dtype=torch.float64)
    for beta in (0.01, 0.3):
        result = merge_tensors(base, tuned, MergeConfig("subspace_boosting", boost_beta=beta))
        error = update_error(result.weight, base, truth(*doubles(base, tuned), beta))
        assert error < 2 * result.report.certificate.error and result.report.certificate.met


def test_a_share_of_all_is_task_arithmetic_and_of_none_is_flat():
    base, tuned = group((24, 17), dtype=torch.float64)
    plain = merge("task_arithmetic", base, tuned)
    assert relative_error(merge("subspace_boosting", base, tuned, boost_beta=1.0) - base, plain - base) < 1e-9
    flat = torch.linalg.svdvals(merge("subspace_boosting", base, tuned, boost_beta=0.0) - base)
    assert relative_error(flat, torch.linalg.matrix_norm(plain - base, 2).expand(17)) < 1e-9


def test_equal_values_are_merged_and_the_choice_of_the_index_is_admitted():
    base = torch.zeros(8, 8, dtype=torch.float64)
    ones = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0]
    result = merge_tensors(base, [ones], MergeConfig("subspace_boosting", boost_beta=0.5))
    assert relative_error(result.weight, ones) < 1e-12 and not result.report.certificate.arbitrary
    edge = torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64))  # the first two hold 5/6
    rotated = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0] @ edge
    result = merge_tensors(base[:3, :3], [rotated], MergeConfig("subspace_boosting", boost_beta=5 / 6))
    assert result.report.certificate.arbitrary and result.report.certificate.met
    assert round(float(torch.linalg.svdvals(result.weight)[2]), 9) in (2.0, 1.0)


def test_what_no_model_touched_stays():
    base, tuned = group((20, 16), dtype=torch.bfloat16)
    base[0, 0] = -0.0
    for tensor in tuned:
        tensor[3], tensor[:, 5], tensor[0, 0] = base[3], base[:, 5], base[0, 0]
    merged = merge_tensors(base, tuned, "subspace_boosting").weight
    assert same_bits(merged[3], base[3]) and same_bits(merged[:, 5].contiguous(), base[:, 5].contiguous())
    assert same_bits(merge_tensors(base, [base, base], "subspace_boosting").weight, base)


def test_deltas_of_low_rank_keep_it():
    base = torch.randn(24, 18, dtype=torch.float64)
    tuned = [base + torch.randn(24, 3, dtype=torch.float64) @ torch.randn(3, 18, dtype=torch.float64) for _ in range(2)]
    got = merge("subspace_boosting", base, tuned)
    assert update_error(got, base, truth(*doubles(base, tuned))) < 1e-9
    assert int(torch.linalg.matrix_rank(got - base, rtol=1e-6)) == 6


@given(st.permutations(range(3)), st.integers(0, 9))
def test_the_order_of_tasks_does_not_matter(order, seed):
    base, tuned = group((12, 15), seed=seed)
    weights = [0.5, 1.0, 1.5]
    plain = merge("subspace_boosting", base, tuned, weights=weights)
    got = merge("subspace_boosting", base, [tuned[i] for i in order], weights=[weights[i] for i in order])
    assert relative_error(got, plain) < 1e-5


@given(st.integers(1, 4), st.integers(0, 9))
def test_equal_tasks_are_one_task_that_is_larger(tasks, seed):
    base, (tensor,) = group((9, 13), 1, torch.float64, seed=seed)
    one = merge("subspace_boosting", base, [tensor], alpha=tasks)
    assert relative_error(merge("subspace_boosting", base, [tensor] * tasks) - base, one - base) < 1e-9


@pytest.mark.parametrize("beta", [-0.1, 1.1, float("nan")])
def test_bad_values(beta):
    with pytest.raises(ConfigError, match="boost_beta"):
        MergeConfig("subspace_boosting", boost_beta=beta)
