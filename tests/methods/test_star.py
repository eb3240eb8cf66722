import numpy as np
import pytest
import torch
from compare import relative_error, same_bits
from hypothesis import given
from hypothesis import strategies as st
from merging import DTYPES, doubles, group, merge, update_error

from r_tsvm_kernels import ConfigError, MergeConfig, merge_tensors
from r_tsvm_kernels.linalg import Factored

MATRICES = [(24, 17), (17, 24), (30, 30), (1, 7), (5, 1), (3, 40)]


def cut(delta, eta):
    """Lee et al., section 3: the smallest rank that holds eta percent of the nuclear norm, rescaled to all of it."""
    left, values, right = np.linalg.svd(delta, full_matrices=False)
    if not values.any():
        return np.zeros_like(delta), 0
    k = next(k for k in range(1, len(values) + 1) if values[:k].sum() >= eta / 100 * values.sum() * (1 - 1e-14))
    return left[:, :k] * values[:k] @ right[:k] * values.sum() / values[:k].sum(), k


def truth(base, tuned, eta=40.0, alpha=1.0, weights=None):
    weights = weights or [1.0] * len(tuned)
    cuts = [cut(t - base, eta)[0] if base.ndim == 2 else t - base for t in tuned]
    return base + alpha * sum(w * c for w, c in zip(weights, cuts, strict=True)) / len(tuned)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*MATRICES, (61,), (), (3, 5, 7)], ids=str)
@pytest.mark.parametrize("tasks", [1, 2, 8])
def test_equals_float64(shape, dtype, tasks):
    base, tuned = group(shape, tasks, dtype)
    assert update_error(merge("star", base, tuned), base, truth(*doubles(base, tuned))) < 1e-5


@pytest.mark.parametrize(
    "options",
    [{"alpha": 0.3}, {"lambda": 0.3}, {"weights": [0.5, -1.0, 2.0]}, {"eta": 5}, {"eta": 85.0}, {"mode": "fast"}],
    ids=str,
)
def test_options_equal_float64(options):
    base, tuned = group((31, 22))
    alpha = options.get("alpha", options.get("lambda", 1.0))
    expected = truth(*doubles(base, tuned), options.get("eta", 40), alpha, options.get("weights"))
    assert update_error(merge("star", base, tuned, **options), base, expected) < 1e-5


@pytest.mark.parametrize("eta", [10, 40, 90, 100])
def test_ranks_and_nuclear_norms(eta):
    base, tuned = group((31, 22), 1, torch.float64)
    result = merge_tensors(base, tuned, MergeConfig("star", eta=eta))
    _, rank = cut((tuned[0] - base).numpy(), eta)
    assert result.report.ranks == [rank] and result.report.certificate.met
    assert result.report.captured_energy[0] == pytest.approx(
        (np.linalg.svd(tuned[0] - base)[1][:rank] ** 2).sum() / float((tuned[0] - base).norm()) ** 2
    )
    update, delta = result.weight - base, tuned[0] - base
    assert float(torch.linalg.matrix_norm(update, "nuc")) == pytest.approx(
        float(torch.linalg.matrix_norm(delta, "nuc")), rel=1e-9
    )


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 3), st.integers(0, 9))
def test_all_of_the_nuclear_norm_is_the_mean(m, n, tasks, seed):
    base, tuned = group((m, n), tasks, torch.float64, seed=seed)
    assert relative_error(merge("star", base, tuned, eta=100), base + (sum(tuned) / tasks - base)) < 1e-10


@pytest.mark.parametrize("eta", [20, 40, 100])
@pytest.mark.parametrize("rank", [1, 3])
def test_factors_equal_the_matrices_they_stand_for(eta, rank):
    torch.manual_seed(0)
    base = torch.randn(30, 20, dtype=torch.float64)
    factors = [Factored(torch.randn(30, rank).double(), torch.randn(rank, 20).double(), 0.5) for _ in range(3)]
    config = MergeConfig("star", eta=eta, weight=[1.0, 0.5, 2.0])
    kept = merge_tensors(base, factors, config)
    formed = merge_tensors(base, [base + factor.dense() for factor in factors], config)
    assert kept.report.ranks == formed.report.ranks
    assert kept.report.captured_energy == pytest.approx(formed.report.captured_energy)
    assert relative_error(kept.weight - base, formed.weight - base) < 1e-9


def test_a_low_rank_matrix_has_no_more_directions():
    torch.manual_seed(0)
    base = torch.zeros(300, 280)
    delta = torch.randn(300, 2) @ torch.randn(2, 280)
    result = merge_tensors(base, [delta], MergeConfig("star", eta=100))
    assert result.report.ranks == [2] and relative_error(result.weight, delta) < 1e-5


def test_what_no_model_touched_stays():
    base, tuned = group((20, 16))
    base[0, 0] = -0.0
    for tensor in tuned:
        tensor[3], tensor[:, 5], tensor[0, 0] = base[3], base[:, 5], base[0, 0]
    for tensor in tuned[1:]:
        tensor[7] = base[7]
    merged = merge("star", base, tuned)
    assert same_bits(merged[3], base[3]) and same_bits(merged[:, 5].contiguous(), base[:, 5].contiguous())
    assert same_bits(merge("star", base, [base, base]), base)
    empty = Factored(torch.zeros(20, 0), torch.zeros(0, 16))
    left = torch.randn(20, 2)
    left[3] = 0
    assert same_bits(merge("star", base, [empty, Factored(torch.zeros(20, 2), torch.zeros(2, 16))]), base)
    assert same_bits(merge("star", base, [empty, Factored(left, torch.randn(2, 16))])[3], base[3])


def test_the_certificate_is_of_the_sum():
    base, tuned = group((31, 22), 2, torch.float64)

    def certificate(*tasks):
        return merge_tensors(base, tasks, MergeConfig("star")).report.certificate

    apart = [certificate(task) for task in tuned]
    whole = certificate(*tuned)
    assert min(part.error for part in apart) < whole.error < 2 * sum(part.error for part in apart)
    assert whole.gap == min(part.gap for part in apart)
    # What is left of two that nearly cancel is not known as well.
    nearly = certificate(tuned[0], base - (tuned[0] - base) * (1 + 1e-3))
    assert nearly.error > 100 * apart[0].error


@pytest.mark.parametrize("eta", [0, -1, 101, float("nan")])
def test_bad_values(eta):
    with pytest.raises(ConfigError, match="eta"):
        MergeConfig("star", eta=eta)


@given(st.sampled_from([2.0**-30, 0.25, 8.0, -1.0]), st.integers(0, 9))
def test_scaling_the_task_vectors_scales_the_update(c, seed):
    base = torch.zeros(14, 18)
    _, tuned = group((14, 18), 2, seed=seed)
    assert relative_error(merge("star", base, [c * t for t in tuned]), c * merge("star", base, tuned)) < 1e-6
