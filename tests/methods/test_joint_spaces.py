"""KnOTS and Core Space against numpy, float64, written from the papers' formulas."""

import numpy as np
import oracle
import pytest
import torch
from compare import relative_error, same_bits
from hypothesis import given
from hypothesis import strategies as st
from merging import DTYPES, drawn, group, merge, update_error

from r_tsvm_kernels import ConfigError, MergeConfig, merge_tensors
from r_tsvm_kernels.linalg import Factored, core_space, joint_svd

SHAPE = (30, 24)
BOTH = pytest.mark.parametrize("method", ["knots", "core_space"])
LOSSLESS = ("task_arithmetic", "linear")
MATRICES = [(24, 17), (17, 24), (1, 7), (5, 1), (3, 40)]


def factors(ranks, shape=SHAPE, seed=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [
        Factored(*(torch.randn(s, generator=generator).to(dtype) for s in ((shape[0], r), (r, shape[1]))), 0.3 + t)
        for t, r in enumerate(ranks)
    ]


def base_tensor(shape=SHAPE, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def isotropic(matrix):
    """All singular values become their mean; directions outside the range of the matrix stay zero."""
    return np.linalg.svd(matrix, compute_uv=False).mean() * oracle.polar(matrix)


def merged_parts(parts, inner, weights, density):
    """Yadav et al. and Yu et al. on the parts; TSV-Merge and sums of them."""
    if inner == "tsvm":
        return oracle.tsv_merge(parts, [int(min(parts[0].shape) / len(parts))] * len(parts), weights)
    zero = np.zeros_like(parts[0])
    if inner in LOSSLESS:
        return oracle.vote_and_sum(zero, parts, weights, normalize=inner == "linear")
    if inner == "ties":
        kept = [oracle.keep_largest(part, density) for part in parts]
    else:
        kept = [drawn(part.shape, density, 0, t) * part / density for t, part in enumerate(parts)]
    return oracle.vote_and_sum(zero, kept, weights, elect="ties" in inner, normalize=inner == "ties")


def signed_like(basis, own):
    """Give the columns of a basis, whose signs are arbitrary, the signs of another."""
    return basis * np.sign((basis * own).sum(0))


def knots(updates, inner, weights, density, like):
    """[D_1 .. D_T] = U S [V_1 .. V_T]; merge the S V_t."""
    dense = [update.dense().numpy() for update in updates]
    left, values, _ = np.linalg.svd(np.hstack(dense), full_matrices=False)
    left = signed_like(left[:, : (values > 1e-10 * values[0]).sum()], like)
    return left @ merged_parts([left.T @ delta for delta in dense], inner, weights, density)


def core(updates, inner, weights, density, like, isotropize=False):
    """D_t = U_B M_t V_A with the singular vectors of all B and of all A; merge the M_t."""
    left = np.linalg.svd(np.hstack([u.left.numpy() for u in updates]), full_matrices=False)[0]
    right = np.linalg.svd(np.vstack([u.right.numpy() for u in updates]), full_matrices=False)[2]
    left, right = signed_like(left, like[0]), signed_like(right.T, like[1].T).T
    cores = [u.scale * left.T @ u.left.numpy() @ u.right.numpy() @ right.T for u in updates]
    merged = merged_parts(cores, inner, weights, density)
    return left @ (isotropic(merged) if isotropize else merged) @ right


OPTIONS = [({}, None), ({"weights": [1.0, 0.5, 2.0]}, None), ({"density": 0.4, "alpha": 0.3}, 0.4)]


@pytest.mark.parametrize("inner", ["ties", "dare_ties", "linear", "task_arithmetic"])
@pytest.mark.parametrize(("options", "density"), OPTIONS, ids=str)
@pytest.mark.parametrize("ranks", [(4, 4, 4), (1, 5, 2), (12, 12, 12)], ids=str)
def test_knots_equals_float64(inner, options, density, ranks):
    base, updates = base_tensor(), factors(ranks)
    got = merge("knots", base, updates, inner_method=inner, **options) - base
    like = joint_svd(updates).U.numpy()
    expected = knots(updates, inner, options.get("weights", [1.0] * 3), density or 1.0, like)
    assert relative_error(got, options.get("alpha", 1.0) * torch.as_tensor(expected)) < 1e-9


@pytest.mark.parametrize("inner", ["tsvm", "ties", "dare_ties", "dare_linear", "linear", "task_arithmetic"])
@pytest.mark.parametrize(("options", "density"), OPTIONS, ids=str)
@pytest.mark.parametrize("ranks", [(4, 4, 4), (2, 5, 3), (12, 12, 12)], ids=str)
@pytest.mark.parametrize("isotropize", [False, True])
def test_core_space_equals_float64(inner, options, density, ranks, isotropize):
    base, updates = base_tensor(), factors(ranks)
    got = merge("core_space", base, updates, inner_method=inner, isotropize=isotropize, **options) - base
    space = core_space(updates)
    like, weights = (space.left.numpy(), space.right.numpy()), options.get("weights", [1.0] * 3)
    expected = core(updates, inner, weights, density or 1.0, like, isotropize)
    assert relative_error(got, options.get("alpha", 1.0) * torch.as_tensor(expected)) < 1e-8


@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*MATRICES, (61,), (3, 5, 7)], ids=str)
@pytest.mark.parametrize("tasks", [1, 3])
def test_sums_in_a_common_basis_are_sums(method, shape, dtype, tasks):
    base, tuned = group(shape, tasks, dtype)
    exact = base.double() + sum(tensor.double() - base.double() for tensor in tuned) / (1 if len(shape) == 2 else tasks)
    got = merge(method, base, tuned, inner_method="task_arithmetic")
    assert update_error(got, base, exact) < 1e-5


@pytest.mark.parametrize(
    ("method", "inner"),
    [("knots", "ties"), ("knots", "linear"), ("core_space", "tsvm"), ("core_space", "linear"), ("core_space", "ties")],
)
@pytest.mark.parametrize("ranks", [(4, 4, 4), (1, 1, 1), (4, 4, 0)], ids=str)
def test_factors_equal_the_matrices_they_stand_for(method, inner, ranks):
    base, given_updates = base_tensor(), factors(ranks)
    balanced = []
    for update in given_updates:  # as a matrix that is not factored counts
        left, values, right = torch.linalg.svd(update.dense(), full_matrices=False)
        r = update.left.shape[1]
        roots = values[:r].sqrt()
        balanced.append(Factored(left[:, :r] * roots, roots[:, None] * right[:r]))
    config = MergeConfig(method, inner_method=inner, density=0.6)
    kept = merge_tensors(base, balanced, config)
    formed = merge_tensors(base, [base + update.dense() for update in balanced], config)
    assert relative_error(kept.weight - base, formed.weight - base) < 1e-7
    assert formed.report.certificate.met and kept.report.ranks == formed.report.ranks


def test_knots_with_all_signs_alike_is_the_mean():
    """One direction, along which no task disagrees: TIES keeps everything, and its disjoint mean is the mean."""
    base, (update,) = base_tensor(), factors((1,))
    same = [Factored(update.left, update.right, scale) for scale in (0.5, 1.0, 3.0)]
    assert relative_error(merge("knots", base, same) - base, Factored(update.left, update.right, 1.5).dense()) < 1e-12


@BOTH
def test_one_task_is_returned_whole(method):
    base, (update,) = base_tensor(), factors((5,))
    assert relative_error(merge(method, base, [update]) - base, update.dense()) < 1e-12
    assert relative_error(merge(method, base, [base + update.dense()]) - base, update.dense()) < 1e-9


@BOTH
@given(st.permutations(range(3)), st.integers(0, 9))
def test_the_order_of_tasks_does_not_matter(method, order, seed):
    base, updates, weights = base_tensor(), factors((3, 3, 3), seed=seed), [0.5, 1.0, 1.5]
    plain = merge(method, base, updates, weights=weights)
    got = merge(method, base, [updates[t] for t in order], weights=[weights[t] for t in order])
    assert relative_error(got - base, plain - base) < 1e-8


@BOTH
@pytest.mark.parametrize("inner", ["ties", *LOSSLESS])
def test_what_no_model_touched_stays(method, inner):
    base, (first, second) = base_tensor(dtype=torch.float32), factors((3, 3), dtype=torch.float32)
    base[0, 0] = -0.0
    for update in (first, second):
        update.left[2], update.right[:, 5] = 0, 0
    for given_updates in ([first, second], [base + first.dense(), base + second.dense()]):
        merged = merge(method, base, given_updates, inner_method=inner)
        assert same_bits(merged[2], base[2]) and same_bits(merged[:, 5].contiguous(), base[:, 5].contiguous())
    zero, empty = Factored(torch.zeros(30, 2), torch.ones(2, 24)), Factored(torch.zeros(30, 0), torch.zeros(0, 24))
    for nothing in ([zero, empty], [empty], [zero], [base, base]):
        assert same_bits(merge(method, base, nothing, inner_method=inner), base)
        assert same_bits(merge(method, base, nothing), base)


def test_a_task_that_changes_nothing_takes_no_rank_from_others():
    base, (update, _) = base_tensor(), factors((4, 0))
    empty = Factored(torch.zeros(30, 0).double(), torch.zeros(0, 24).double())
    assert relative_error(merge("core_space", base, [empty, update]) - base, update.dense()) < 1e-12


@pytest.mark.parametrize("formed", [False, True])
@BOTH
def test_tasks_that_share_nothing_do_not_dilute_each_other(method, formed):
    """In their common basis each has zeros where the other is, and no rounding errors that would count as elements."""
    base, updates = base_tensor(), factors((3, 3))
    Q = torch.linalg.qr(torch.randn(30, 6, generator=torch.Generator().manual_seed(1)).double()).Q
    P = torch.linalg.qr(torch.randn(24, 6, generator=torch.Generator().manual_seed(2)).double()).Q.mT
    apart = [
        Factored(Q[:, t::2] @ update.left[:3], update.right[:, :3] @ P[t::2], 0.3) for t, update in enumerate(updates)
    ]
    given_updates = [base + update.dense() for update in apart] if formed else apart
    got = merge(method, base, given_updates, inner_method="ties") - base
    assert relative_error(got, apart[0].dense() + apart[1].dense()) < 1e-9


def test_masks_depend_on_the_name_of_the_tensor():
    base, updates = base_tensor(), factors((4, 4, 4))
    options = {"inner_method": "dare_ties", "density": 0.5}
    first, again, other = (merge("knots", base, updates, name=name, **options) for name in ("a", "a", "b"))
    assert same_bits(first, again) and relative_error(first, other) > 0.01


@BOTH
def test_bad_values(method):
    with pytest.raises(ConfigError, match="inner_method"):
        MergeConfig(method, inner_method="slerp")
    with pytest.raises(ConfigError, match="density"):
        MergeConfig(method, density=1.5)


@pytest.mark.parametrize("inner", ["linear", "ties"])
@pytest.mark.parametrize("method", ["knots", "core_space"])
def test_certificates_of_averages_do_not_depend_on_the_scale_of_the_weights(method, inner):
    base, generator = torch.zeros(SHAPE, dtype=torch.float64), torch.Generator().manual_seed(0)
    tuned = [torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(2)]
    errors = [
        merge_tensors(base, tuned, MergeConfig(method, inner_method=inner, weight=[w, w])).report.certificate.error
        for w in (1.0, 2.0**-12, 2.0**30)
    ]
    assert errors[1:] == pytest.approx([errors[0]] * 2, rel=1e-6)


@pytest.mark.parametrize("method", ["task_arithmetic", "linear"])
def test_knots_of_tasks_that_cancel_each_other_is_nothing_and_certified(method):
    base = torch.zeros(60, 40)
    task = (torch.randn(60, 5) @ torch.randn(5, 40)).to(torch.float32)
    weights = [1.0, -1.0] if method == "task_arithmetic" else [1.0, 1.0]
    tuned = [task, task if method == "task_arithmetic" else -task]
    config = MergeConfig("knots", weight=weights, inner_method=method)
    result = merge_tensors(base, tuned, config)
    assert result.report.certificate.met
    assert result.weight.abs().amax() <= 1e-6 * task.abs().amax()


@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize(("rows", "columns"), [(6, 24), (30, 5), (6, 6), (4, 4)])
def test_the_certificate_of_core_space_ignores_directions_that_no_core_uses(rows, columns, same):
    """The factors have 9 columns; where fewer rows are nonzero, the rest of the basis is null vectors."""
    updates = factors((3, 3, 3))
    updates = [updates[0]] * 3 if same else updates
    for update in updates:
        update.left[rows:], update.right[:, columns:] = 0, 0
    base = torch.zeros(SHAPE, dtype=torch.float64)
    got = merge_tensors(base, updates, MergeConfig("core_space", inner_method="tsvm"))
    dense = [update.dense().numpy() for update in updates]
    truth = oracle.tsv_merge(dense, got.report.ranks, [1.0] * 3)
    error = relative_error(got.weight, torch.from_numpy(truth))
    assert error <= got.report.certificate.error < 1e-12
