from dataclasses import replace

import numpy as np
import oracle
import pytest
import torch
from compare import relative_error, same_bits
from hypothesis import given
from hypothesis import strategies as st
from merging import DTYPES, doubles, group, merge, update_error

from r_tsvm_kernels import MergeConfig, merge_tensors
from r_tsvm_kernels.linalg import truncated_svd
from r_tsvm_kernels.methods import iso_cts
from r_tsvm_kernels.methods.iso_cts import common_and_own_ranks

BOTH = pytest.mark.parametrize("method", ["iso_c", "iso_cts"])
MATRICES = [(24, 17), (17, 24), (30, 30), (1, 7), (5, 1), (3, 40)]


def triplets(matrix, rank, scale):
    """Leading singular triplets above float32 rounding of a matrix with this norm."""
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    k = min(rank, int((values > np.finfo(np.float32).eps * scale).sum()))
    return left[:, :k], values[:k], right[:k]


def truth(method, base, tuned, alpha=1.0, common_space_fraction=0.8, weights=None):
    """Marczak et al., algorithms 1 and 2."""
    weights, tasks = weights or [1.0] * len(tuned), len(tuned)
    deltas = [w * (t - base) for w, t in zip(weights, tuned, strict=True)]
    if base.ndim != 2:
        return base + alpha * sum(deltas) / tasks
    total, short = sum(deltas), min(base.shape)
    if method == "iso_c":
        values = np.linalg.svd(total, compute_uv=False)
        return base + alpha * values.mean() * oracle.polar(total)
    own = min(round((short - int(short * common_space_fraction)) / tasks), short // tasks)
    common = triplets(total, short - own * tasks, np.linalg.norm(total))
    parts = [common]
    for delta in deltas:
        rest = delta - common[0] @ (common[0].T @ delta)
        parts.append(triplets(rest, own, np.linalg.norm(delta)))
    left = oracle.polar(np.hstack([part[0] for part in parts]))
    right = oracle.polar(np.vstack([part[2] for part in parts]))
    mean = sum(part[1].sum() for part in parts) / short
    return base + alpha * mean * left @ right


@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*MATRICES, (61,), (), (3, 5, 7)], ids=str)
@pytest.mark.parametrize("tasks", [1, 2, 3, 8])
def test_equals_float64(method, shape, dtype, tasks):
    base, tuned = group(shape, tasks, dtype)
    assert update_error(merge(method, base, tuned), base, truth(method, *doubles(base, tuned))) < 1e-5


@BOTH
@pytest.mark.parametrize(
    "options",
    [{"alpha": 0.3}, {"scaling_factor": 0.3}, {"weights": [0.5, -1.0, 2.0]}, {"mode": "fast"}],
    ids=str,
)
def test_options_equal_float64(method, options):
    base, tuned = group((31, 22))
    alpha = options.get("alpha", options.get("scaling_factor", 1.0))
    got = merge(method, base, tuned, **options)
    assert update_error(got, base, truth(method, *doubles(base, tuned), alpha, weights=options.get("weights"))) < 1e-5


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(31, 22), (2, 9)], ids=str)
def test_fractions_equal_float64(fraction, shape):
    # With fewer rows than tasks FusionBench's rounding may ask for a negative number of common directions.
    base, tuned = group(shape)
    got = merge("iso_cts", base, tuned, common_space_fraction=fraction)
    assert update_error(got, base, truth("iso_cts", *doubles(base, tuned), common_space_fraction=fraction)) < 1e-5


def test_inexact_subspaces_are_found_again_by_svd(monkeypatch):
    base, tuned = group((31, 22))
    plain = merge("iso_cts", base, tuned)

    def inexact(matrices, ranks, mode):
        found = truncated_svd(matrices, ranks, mode=mode)
        return replace(found, cuts=(replace(found.cuts[0], measured=1e-3),))

    monkeypatch.setattr(iso_cts, "truncated_svd", inexact)
    again = merge_tensors(base, tuned, MergeConfig("iso_cts"))
    assert relative_error(again.weight, plain) < 1e-6
    certificate = again.report.certificate
    assert certificate.met and certificate.route == "svd-float64" and "must be at most" in certificate.escalations[0]


@given(st.integers(1, 500), st.integers(1, 20), st.floats(0, 1))
def test_ranks_add_up(short, tasks, fraction):
    common, own = common_and_own_ranks(short, tasks, fraction)
    assert common >= 0 and own >= 0 and common + tasks * own == short


def test_all_singular_values_become_their_mean():
    base, tuned = torch.zeros(20, 30), [torch.randn(20, 30) for _ in range(2)]
    values = torch.linalg.svdvals(merge("iso_c", base, tuned))
    mean = torch.linalg.svdvals(sum(tuned)).mean()
    assert relative_error(values, mean.expand(20)) < 1e-5


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_untouched_rows_and_columns_are_the_base_s_bit_for_bit(method, dtype):
    # FusionBench completes the singular vectors by arbitrary ones, which reach rows that no task touched.
    base, tuned = group((40, 30), 3, dtype)
    base[6, ::2] = -0.0
    for tensor in tuned:
        tensor[4:17] = base[4:17]
        tensor[:, 11] = base[:, 11]
    got = merge_tensors(base, tuned, MergeConfig(method)).weight
    assert same_bits(got[4:17], base[4:17]) and same_bits(got[:, 11], base[:, 11])
    assert update_error(merge(method, base, tuned), base, truth(method, *doubles(base, tuned))) < 1e-5


@BOTH
def test_deltas_of_low_rank(method):
    base = torch.randn(24, 18, dtype=torch.float64)
    tuned = [base + torch.randn(24, 3, dtype=torch.float64) @ torch.randn(3, 18, dtype=torch.float64) for _ in range(2)]
    got = merge(method, base, tuned)
    assert update_error(got, base, truth(method, *doubles(base, tuned))) < 1e-9
    assert int(torch.linalg.matrix_rank(got - base, rtol=1e-6)) == 6


@BOTH
def test_untouched_matrices_stay(method):
    base, _ = group()
    base[0, 0] = -0.0
    assert same_bits(merge(method, base, [base, base]), base)


@BOTH
def test_what_is_excluded_gets_the_mean(method):
    base, tuned = group()
    config = MergeConfig(method, exclude_keys=["*embed*"], alpha=0.5)
    got = merge_tensors(base, tuned, config, name="model.embed.weight")
    assert got.report.treatment == "mean"
    assert relative_error(got.weight, base + 0.5 * (sum(tuned) / 3 - base)) < 1e-6


def test_fewer_rows_than_tasks_are_merged():
    base, tuned = group((2, 30), 4)
    report = merge_tensors(base, tuned, MergeConfig("iso_c")).report
    assert (report.treatment, report.reason) == ("merge", "") and report.certificate.met


@given(st.integers(1, 12), st.integers(1, 12), st.floats(0, 1), st.integers(0, 9))
def test_one_task_has_nothing_but_common_directions(m, n, fraction, seed):
    base, tuned = group((m, n), 1, torch.float64, seed=seed)
    plain = merge("iso_c", base, tuned)
    assert relative_error(merge("iso_cts", base, tuned, common_space_fraction=fraction), plain) < 1e-6


@given(st.permutations(range(3)), st.sampled_from(["iso_c", "iso_cts"]), st.integers(0, 9))
def test_the_order_of_tasks_does_not_matter(order, method, seed):
    base, tuned = group((12, 15), seed=seed)
    weights = [0.5, 1.0, 1.5]
    plain = merge(method, base, tuned, weights=weights)
    got = merge(method, base, [tuned[i] for i in order], weights=[weights[i] for i in order])
    assert relative_error(got, plain) < 1e-5


@given(st.sampled_from([2.0**-30, 0.25, 8.0, -1.0]), st.sampled_from(["iso_c", "iso_cts"]), st.integers(0, 9))
def test_scaling_the_task_vectors_scales_the_update(c, method, seed):
    base = torch.zeros(14, 18)
    _, tuned = group((14, 18), 2, seed=seed)
    plain = merge(method, base, tuned)
    assert relative_error(merge(method, base, [c * t for t in tuned]), c * plain) < 1e-6
