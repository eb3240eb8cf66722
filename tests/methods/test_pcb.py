import numpy as np
import pytest
import torch
from compare import relative_error, same_bits
from hypothesis import given
from hypothesis import strategies as st
from merging import DTYPES, SHAPES, doubles, group, merge, update_error

from r_tsvm_kernels import ConfigError, MergeConfig, merge_tensors
from r_tsvm_kernels.methods import get_method


def norm(x):
    return (x - x.min()) / (x.max() - x.min()) if x.max() > x.min() else np.zeros_like(x)


def truth(base, tuned, density=0.1, alpha=1.0, weights=None):
    """Du et al.'s PCB matrices, for each task from its sorted values."""
    weights, T, n = weights or [1.0] * len(tuned), len(tuned), base.size
    densities = np.broadcast_to(density, T)
    deltas = [(t - base).ravel() for t in tuned]
    agreement = sum(deltas)
    above, below = np.zeros(n), np.zeros(n)
    for w, d, delta in zip(weights, densities, deltas, strict=True):
        by_size = np.sort(abs(delta))
        size = np.clip(abs(delta), by_size[int(n * 1e-4)], by_size[max(0, int(n * (1 - 1e-4) - 1))])
        score = np.exp(T * norm(size) ** 2) * np.tanh(delta * agreement)
        least = np.sort(score)[min(int(n * (1 - d)), n - 1)]
        scale = norm(np.maximum(score, least)) if score.max() > least else (score >= least) * (score > 0.0)
        scale = scale if d else 0 * scale
        above += w * scale * np.sign(delta) * size
        below += scale
    return base + alpha * (above / np.where(below == 0, 1, below)).reshape(base.shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tasks", [1, 2, 3, 8])
def test_equals_float64(shape, dtype, tasks):
    base, tuned = group(shape, tasks, dtype)
    for density in (0.0, 0.1, 0.6, 1.0):
        got = merge("pcb", base, tuned, density=density)
        assert update_error(got, base, truth(*doubles(base, tuned), density)) < 1e-5


def test_magnitudes_are_clipped_at_both_ends():
    base, tuned = group((311, 97), 3, torch.float64)
    exact = truth(*doubles(base, tuned), 0.3)
    assert relative_error(merge("pcb", base, tuned, density=0.3), exact) < 1e-10
    assert float((torch.as_tensor(exact) - base).abs().max()) < float((tuned[0] - base).abs().max())


@pytest.mark.parametrize(
    "options",
    [{"alpha": 0.3}, {"lambda": 0.3}, {"weights": [0.5, -1.0, 2.0]}, {"density": [0.1, 0.5, 1.0]}],
    ids=str,
)
def test_options_equal_float64(options):
    base, tuned = group((31, 22))
    alpha = options.get("alpha", options.get("lambda", 1.0))
    exact = truth(*doubles(base, tuned), options.get("density", 0.1), alpha, options.get("weights"))
    assert update_error(merge("pcb", base, tuned, **options), base, exact) < 1e-5


def test_an_element_against_the_others_is_not_kept():
    base = torch.zeros(6)
    tuned = [torch.tensor([4.0, 3.0, 2.0, 1.0, 0.5, 0.2]), torch.tensor([3.0, -5.0, 2.0, 1.0, 0.5, 0.2])]
    merged = merge("pcb", base, tuned, density=0.5)
    assert float(merged[1]) < 0 and float(merged[0]) > 0  # the sum is negative: the first task has no say


@pytest.mark.parametrize("density", [0.3, 1.0])
def test_untouched_tensors_stay(density):
    base, tuned = group()
    base[0, 0] = -0.0
    assert same_bits(merge("pcb", base, [base, base], density=density), base)
    assert same_bits(merge("pcb", base, tuned, density=0), base)


def test_a_task_of_zeros_has_no_say():
    base, tuned = group(tasks=1, dtype=torch.float64)
    got = merge("pcb", base, [*tuned, base], density=0.3)
    assert relative_error(got, truth(*doubles(base, [*tuned, base]), 0.3)) < 1e-12
    alone = merge("pcb", base, tuned, density=0.3)
    assert int(((got - base != 0) == (alone - base != 0)).sum()) == base.numel()


def test_scores_that_are_all_equal():
    base = torch.zeros(5)
    ones = torch.ones(5)
    assert torch.equal(merge("pcb", base, [ones, 2 * ones]), 1.5 * ones)
    assert torch.equal(merge("pcb", base, [ones, -2 * ones]), -2 * ones)  # the first is against the sum
    assert float(merge("pcb", torch.tensor(0.0), [torch.tensor(3.0), torch.tensor(1.0)])) == 2.0


@given(st.integers(1, 4), st.floats(0.1, 1), st.integers(0, 9))
def test_equal_tasks_keep_their_clipped_values(tasks, density, seed):
    base, (tensor,) = group((9, 13), 1, torch.float64, seed=seed)
    update = merge("pcb", base, [tensor] * tasks, density=density) - base
    delta = tensor - base
    largest = delta.abs().flatten().sort().values[-2]
    kept = update.abs() > 1e-12
    assert int(kept.sum()) <= int(np.ceil(density * delta.numel()))
    assert relative_error(update[kept], delta.clamp(-largest, largest)[kept]) < 1e-9


@given(st.permutations(range(3)), st.floats(0.1, 1), st.integers(0, 9))
def test_the_order_of_tasks_does_not_matter(order, density, seed):
    base, tuned = group((9, 13), seed=seed)
    weights, densities = [0.5, 1.0, 1.5], [density, 0.5, 0.2]
    plain = merge("pcb", base, tuned, weights=weights, density=densities)
    got = merge(
        "pcb", base, [tuned[i] for i in order], weights=[weights[i] for i in order],
        density=[densities[i] for i in order],
    )  # fmt: skip
    assert relative_error(got - base, plain - base) < 1e-5


def test_many_tasks_do_not_overflow():
    base, tuned = group((5, 7), 3)
    many = merge("pcb", base, tuned * 300, density=0.5)
    assert bool(many.isfinite().all()) and bool((many != base).any())


@pytest.mark.parametrize("options", [{"density": 1.1}, {"density": -0.1}], ids=str)
def test_bad_values(options):
    with pytest.raises(ConfigError, match="density"):
        MergeConfig("pcb", **options)


def test_strides_and_its_other_name():
    base, tuned = group((12, 9))
    turned = merge_tensors(base.mT, [tensor.mT for tensor in tuned], "pcb").weight
    assert same_bits(turned.mT.contiguous(), merge("pcb", base, tuned))
    assert get_method("pcb_merging") is get_method("pcb")
