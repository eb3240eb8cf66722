import math

import oracle
import pytest
import torch
from compare import relative_error, same_bits
from hypothesis import given
from hypothesis import strategies as st

from r_tsvm_kernels import MergeConfig, merge_tensors

TSVM = MergeConfig("tsvm")


def group(shape=(48, 36), tasks=3, dtype=torch.float32, seed=0):
    """Heavy-tailed task vectors, so that outliers and sparsity exist."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator)
    tuned = [base + 0.02 * torch.randn(shape, generator=generator) ** 3 for _ in range(tasks)]
    return base.to(dtype), [t.to(dtype) for t in tuned]


def check(base, tuned, tolerance=1e-4, weights=None, **options):
    config = MergeConfig("rtsvm", weight=weights, **options)
    got = merge_tensors(base, tuned, config, out_dtype=torch.float64)
    exact_base = base.double().numpy()
    exact, ranks = oracle.rtsvm(exact_base, [t.double().numpy() for t in tuned], weights=weights, **options)
    assert got.report.ranks == ranks
    assert relative_error(got.weight - base.double(), exact - exact_base) < tolerance
    return got


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tasks", [1, 2, 3, 8])
def test_update_equals_float64(dtype, tasks):
    got = check(*group(tasks=tasks, dtype=dtype))
    assert all(0 < z < 1 for z in got.report.sparsities)
    assert all(0 < q < 1 for q in got.report.outlier_masses)


@pytest.mark.parametrize(
    "options",
    [
        {"outlier_weighting": "none"},
        {"outlier_weighting": "damp"},
        {"outlier_weighting": "boost"},
        {"outlier_weighting": "complement"},
        {"outlier_sigma": 1.5},
        {"density": 0.3},
        {"density": 0.3, "rank_rho": 2.0},
        {"density": 0.05, "outlier_sigma": 0.5},
        {"sparsity_eps": 0.5},
        {"rank": "fixed"},
        {"rank": "energy", "rank_energy": 0.6},
        {"rank": "noise"},
        {"rank": 5},
        {"alpha": 0.4},
        {"weights": [0.5, 1.0, 2.0], "outlier_weighting": "damp"},
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(48, 36), (31, 90)], ids=str)
def test_every_option_equals_float64(options, shape):
    check(*group(shape), **options)


@given(
    st.sampled_from([{"outlier_weighting": "none"}, {"outlier_sigma": math.inf}]),
    st.integers(3, 40),
    st.integers(3, 40),
    st.integers(1, 3),
    st.integers(0, 99),
)
def test_without_its_ingredients_it_is_tsv_merge(off, m, n, tasks, seed):
    base, tuned = group((m, n), tasks, seed=seed)
    config = MergeConfig("rtsvm", density=1.0, rank_rho=0.0, **off)
    assert same_bits(merge_tensors(base, tuned, config).weight, merge_tensors(base, tuned, TSVM).weight)


@given(st.sampled_from(["clip", "damp", "boost", "complement", "none"]), st.integers(1, 5), st.integers(0, 9))
def test_equal_tasks_get_equal_weights(weighting, tasks, seed):
    base, tuned = group((12, 10), 1, seed=seed)
    config = MergeConfig("rtsvm", outlier_weighting=weighting)
    assert merge_tensors(base, tuned * tasks, config).report.weights == pytest.approx([1.0] * tasks)


@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 9))
def test_one_task_at_full_rank_is_the_fine_tune(m, n, seed):
    base, tuned = group((m, n), 1, seed=seed)
    config = MergeConfig("rtsvm", outlier_weighting="none", rank="fixed")
    assert relative_error(merge_tensors(base, tuned, config).weight, tuned[0]) < 1e-6


@given(st.permutations(range(3)), st.sampled_from(["clip", "damp", "boost"]), st.integers(0, 9))
def test_the_order_of_tasks_does_not_matter(order, weighting, seed):
    base, tuned = group((15, 21), seed=seed)
    weights = [0.5, 1.0, 1.5]
    options = {"outlier_weighting": weighting, "density": 0.5}
    plain = merge_tensors(base, tuned, MergeConfig("rtsvm", weight=weights, **options)).weight
    config = MergeConfig("rtsvm", weight=[weights[i] for i in order], **options)
    assert relative_error(merge_tensors(base, [tuned[i] for i in order], config).weight, plain) < 1e-6


@given(st.sampled_from([2.0**-30, 0.25, 8.0, -1.0]), st.sampled_from(["clip", "damp"]), st.integers(0, 9))
def test_scaling_the_task_vectors_scales_the_update(c, weighting, seed):
    base = torch.zeros(14, 18)
    _, tuned = group((14, 18), 2, seed=seed)
    config = MergeConfig("rtsvm", outlier_weighting=weighting, density=0.6)
    plain = merge_tensors(base, tuned, config).weight
    assert relative_error(merge_tensors(base, [c * t for t in tuned], config).weight, c * plain) < 1e-6


@given(st.integers(3, 30), st.integers(3, 30), st.integers(1, 3), st.floats(0.05, 1), st.integers(0, 9))
def test_ranks_never_sum_above_the_short_side(m, n, tasks, density, seed):
    base, tuned = group((m, n), tasks, seed=seed)
    for rank in ("sparsity", "fixed", "energy", "noise", 7):
        report = merge_tensors(base, tuned, MergeConfig("rtsvm", density=density, rank=rank)).report
        assert sum(report.ranks) <= min(m, n)


@pytest.mark.parametrize("density", [1.0, 0.4])
def test_untouched_rows_and_columns_are_the_base_s_bit_for_bit(density):
    base, tuned = group((40, 30), dtype=torch.bfloat16)
    base[6, ::2] = -0.0
    for t in tuned:
        t[4:17] = base[4:17]
        t[:, 11] = base[:, 11]
    got = merge_tensors(base, tuned, MergeConfig("rtsvm", density=density)).weight
    assert same_bits(got[4:17], base[4:17]) and same_bits(got[:, 11], base[:, 11])
    assert (got != base).any()


def test_pruning_to_nothing_is_the_base():
    base, tuned = group()
    got = merge_tensors(base, tuned, MergeConfig("rtsvm", density=0.0))
    assert same_bits(got.weight, base)
    assert got.report.ranks == [0, 0, 0]


def test_fewer_rows_than_tasks_get_the_mean():
    base, tuned = group((2, 40))
    got = merge_tensors(base, tuned, MergeConfig("rtsvm"))
    assert (got.report.treatment, got.report.reason) == ("mean", "fewer rows or columns than tasks")
    assert relative_error(got.weight, sum(tuned) / 3) < 1e-6


def test_one_density_per_model():
    base, tuned = group(tasks=2)
    config = MergeConfig(
        merge_method="rtsvm",
        models=({"parameters": {"density": 0.2}}, {}),
        parameters={"density": 0.6, "outlier_weighting": "none"},
    )
    got = merge_tensors(base, tuned, config)
    assert got.report.sparsities[0] > 0.79 > got.report.sparsities[1] > 0.39
