import numpy as np
import oracle
import pytest
import torch
from compare import relative_error, same_bits
from hypothesis import given
from hypothesis import strategies as st
from merging import DTYPES, SHAPES, doubles, drawn, group, merge, update_error
from variants import torch_threads

from r_tsvm_kernels import MergeConfig, merge_state_dicts

BOTH = pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])


def truth(method, base, tuned, density=1.0, weights=None, alpha=1.0, normalize=False, rescale=True, seed=0, name="w"):
    """Yu et al., eq. 2-4: drop with probability 1 - density, divide by density."""
    factor = 1 / density if rescale and density else 1.0
    kept = [drawn(base.shape, density, seed, i, name) * factor * (t - base) for i, t in enumerate(tuned)]
    elect = method == "dare_ties"
    return oracle.vote_and_sum(base, kept, weights or [1.0] * len(tuned), alpha, elect=elect, normalize=normalize)


@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tasks", [1, 3, 8])
def test_equals_float64(method, shape, dtype, tasks):
    base, tuned = group(shape, tasks, dtype)
    for density in (0.0, 0.3, 1.0):
        got = merge(method, base, tuned, density=density)
        assert update_error(got, base, truth(method, *doubles(base, tuned), density)) < 1e-5


@BOTH
@pytest.mark.parametrize(
    "options",
    [{"normalize": True}, {"alpha": 0.3}, {"weights": [0.5, -1.0, 2.0]}, {"rescale": False}, {"seed": 7}],
    ids=str,
)
def test_options_equal_float64(method, options):
    base, tuned = group((31, 22))
    got = merge(method, base, tuned, density=0.4, **options)
    assert update_error(got, base, truth(method, *doubles(base, tuned), 0.4, **options)) < 1e-6


def test_the_mean_over_seeds_is_task_arithmetic():
    # mergekit scales to the L1 norm of the task vector instead: a factor that depends on the draw.
    base, tuned = group((40, 50), 2)
    seeds = 300
    mean = sum(merge("dare_linear", base, tuned, density=0.5, seed=s).double() for s in range(seeds)) / seeds
    exact = merge("task_arithmetic", base, tuned).double()
    # The sd of an element is that of a coin with p = 0.5: its own size, over the root of the number of draws.
    assert relative_error(mean - base, exact - base) < 1.5 / seeds**0.5
    short = merge("dare_linear", base, tuned, density=0.5, rescale=False, seed=1)
    assert 0.4 < float((short - base).norm() ** 2 / (exact - base).norm() ** 2) < 0.6


def test_masks_depend_on_seed_tensor_and_task_alone():
    base, _ = group((30, 40))
    tuned = [base + 1.0] * 2

    def kept(tasks=(0, 1), **options):
        return merge("dare_linear", base, [tuned[i] for i in tasks], density=0.5, rescale=False, **options) - base

    both, other_seed, other_name = kept(), kept(seed=1), kept(name="v")
    assert same_bits(both, kept())
    assert set(both.round().unique().tolist()) == {0.0, 1.0, 2.0}  # the tasks' masks are independent
    for other in (other_seed, other_name):
        assert not torch.equal(both.round(), other.round())


def test_order_of_tensors_and_threads_do_not_matter():
    base = {name: torch.randn(50, 60) for name in "abc"}
    tuned = [{name: tensor + torch.randn(50, 60) for name, tensor in base.items()} for _ in range(2)]
    config = MergeConfig("dare_ties", density=0.4)
    plain = merge_state_dicts(base, tuned, config).state_dict
    backwards = {name: base[name] for name in "cba"}
    with torch_threads(1):
        again = merge_state_dicts(backwards, tuned, config).state_dict
    assert all(same_bits(plain[name], again[name]) for name in "abc")


@BOTH
def test_untouched_tensors_stay(method):
    base, _ = group()
    base[0, 0] = -0.0
    assert same_bits(merge(method, base, [base, base], density=0.3), base)


@given(st.sampled_from(["dare_linear", "dare_ties"]), st.sampled_from([2.0**-30, 0.25, 8.0]), st.integers(0, 9))
def test_scaling_the_task_vectors_scales_the_update(method, c, seed):
    base = torch.zeros(9, 13)
    _, tuned = group((9, 13), seed=seed)
    plain = merge(method, base, tuned, density=0.4)
    assert relative_error(merge(method, base, [c * t for t in tuned], density=0.4), c * plain) < 1e-6


@given(st.permutations(range(3)), st.integers(0, 9))
def test_the_order_of_tasks_does_not_matter_where_nothing_is_drawn(order, seed):
    # Masks go by position, so with a density below 1 another order is another draw.
    base, tuned = group((9, 13), seed=seed)
    for method in ("dare_linear", "dare_ties"):
        assert relative_error(merge(method, base, [tuned[i] for i in order]), merge(method, base, tuned)) < 1e-6


def test_one_in_density_is_kept():
    base, tuned = torch.zeros(200, 300), [torch.ones(200, 300)]
    kept = (merge("dare_linear", base, tuned, density=0.3) != 0).double().mean()
    assert abs(kept - 0.3) < 4 * np.sqrt(0.3 * 0.7 / 60000)
