import numpy as np
import pytest
import torch
from compare import relative_error, same_bits
from hypothesis import given
from hypothesis import strategies as st
from merging import DTYPES, SHAPES, doubles, group, merge, update_error

from r_tsvm_kernels import ConfigError, MergeConfig
from r_tsvm_kernels.methods import get_method


def truth(base, tuned, lambdas=0.4, k=2, alpha=1.0, weights=None):
    """Wang et al., equations 4 and 5: the mask of each task, and the consensus of at least k of them."""
    weights = np.ones(len(tuned)) if weights is None else np.array(weights)
    taus = np.array([w * (t - base) for w, t in zip(weights, tuned, strict=True)])
    total = taus.sum(0)
    lambdas = np.broadcast_to(lambdas, len(tuned))
    masks = np.array([abs(tau) >= own * abs(total - tau) for tau, own in zip(taus, lambdas, strict=True)])
    return base + alpha * np.where(masks.sum(0) >= min(k, len(tuned)), total, 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tasks", [1, 2, 3, 8])
def test_equals_float64(shape, dtype, tasks):
    base, tuned = group(shape, tasks, dtype)
    for k in (1, 2, 3):
        got = merge("consensus_ta", base, tuned, consensus_threshold=k)
        assert update_error(got, base, truth(*doubles(base, tuned), k=k)) < 1e-6


@pytest.mark.parametrize(
    "options",
    [
        {"alpha": 0.3}, {"lambda": 0.3}, {"tall_lambda": 0.2}, {"tall_lambda": [0.2, 0.6, 1.5]}, {"tall_lambda": 0.0},
        {"weights": [0.5, -1.0, 2.0], "consensus_threshold": 1},
    ],
    ids=str,
)  # fmt: skip
def test_options_equal_float64(options):
    base, tuned = group((31, 22))
    exact = truth(
        *doubles(base, tuned), options.get("tall_lambda", 0.4), options.get("consensus_threshold", 2),
        options.get("alpha", options.get("lambda", 1.0)), options.get("weights"),
    )  # fmt: skip
    assert update_error(merge("consensus_ta", base, tuned, **options), base, exact) < 1e-6


def test_selfish_and_catastrophic_elements_are_dropped():
    base = torch.zeros(4)
    #                       both   first  neither: they cancel  equal parts, at the threshold
    tuned = [torch.tensor([3.0, 5.0, 1.0, 2.0]), torch.tensor([2.0, 1.0, -1.0, 2.0])]
    assert merge("consensus_ta", base, tuned).tolist() == [5.0, 0.0, 0.0, 4.0]
    assert merge("consensus_ta", base, tuned, tall_lambda=1.0).tolist() == [0.0, 0.0, 0.0, 4.0]
    assert merge("consensus_ta", base, tuned, consensus_threshold=1).tolist() == [5.0, 6.0, 0.0, 4.0]


@pytest.mark.parametrize("k", [0, 1, 2, 5])
def test_one_model_is_kept_whole(k):
    base, tuned = group(tasks=1)
    assert same_bits(merge("consensus_ta", base, tuned, consensus_threshold=k), merge("task_arithmetic", base, tuned))


def test_no_consensus_is_needed_with_zero():
    base, tuned = group()
    plain = merge("task_arithmetic", base, tuned, alpha=0.4)
    assert relative_error(merge("consensus_ta", base, tuned, consensus_threshold=0, alpha=0.4), plain) < 1e-6


def test_what_is_not_kept_stays_bit_for_bit():
    base, tuned = group()
    base[0, 0] = -0.0
    assert same_bits(merge("consensus_ta", base, [base, base]), base)
    merged = merge("consensus_ta", base, tuned)
    kept = torch.from_numpy(truth(*doubles(base, tuned)) != base.double().numpy())
    assert not kept.all() and same_bits(merged[~kept], base[~kept])


@given(st.integers(2, 5), st.floats(0, 1), st.integers(0, 9))
def test_equal_tasks_keep_all(tasks, tall_lambda, seed):
    base, (tensor,) = group((9, 7), 1, torch.float64, seed=seed)
    got = merge("consensus_ta", base, [tensor] * tasks, tall_lambda=tall_lambda / (tasks - 1) * (1 - 1e-9))
    assert relative_error(got - base, tasks * (tensor - base)) < 1e-12


@given(st.permutations(range(3)), st.integers(0, 9))
def test_the_order_of_tasks_does_not_matter(order, seed):
    base, tuned = group((9, 13), dtype=torch.bfloat16, seed=seed)
    weights, lambdas = [0.5, 1.0, 1.5], [0.3, 0.4, 0.5]
    plain = merge("consensus_ta", base, tuned, weights=weights, tall_lambda=lambdas)
    got = merge(
        "consensus_ta", base, [tuned[i] for i in order], weights=[weights[i] for i in order],
        tall_lambda=[lambdas[i] for i in order],
    )  # fmt: skip
    assert same_bits(got, plain)


@given(st.sampled_from([2.0**-40, 0.25, 8.0]), st.integers(0, 9))
def test_scaling_the_task_vectors_scales_the_update(c, seed):
    base = torch.zeros(9, 13)
    _, tuned = group((9, 13), seed=seed)
    assert same_bits(merge("consensus_ta", base, [c * t for t in tuned]), c * merge("consensus_ta", base, tuned))


def test_large_tensors_are_merged_piece_by_piece_and_in_rows():
    base, tuned = group((700, 101), dtype=torch.bfloat16)
    whole = merge("consensus_ta", base, tuned)
    assert update_error(whole, base, truth(*doubles(base, tuned))) < 1e-6
    rows = [merge("consensus_ta", base[i : i + 53], [t[i : i + 53] for t in tuned]) for i in range(0, 700, 53)]
    assert same_bits(torch.cat(rows), whole)
    assert same_bits(merge("consensus_ta", base.mT, [t.mT for t in tuned]), whole.mT.contiguous())


@pytest.mark.parametrize(
    "options", [{"tall_lambda": -0.1}, {"tall_lambda": float("nan")}, {"consensus_threshold": -1},
                {"consensus_threshold": 1.5}], ids=str)  # fmt: skip
def test_bad_values(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        MergeConfig("consensus_ta", **options)


def test_its_other_names():
    assert get_method("consensus") is get_method("tall_mask") is get_method("consensus_ta")
