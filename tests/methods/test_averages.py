"""linear and task_arithmetic."""

import pytest
import torch
from compare import relative_error, same_bits

from r_tsvm_kernels import ConfigError, MergeConfig, merge_tensors
from r_tsvm_kernels.ops import elect_and_sum

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def group(dtype=torch.float32, tasks=3, shape=(13, 7)):
    base = torch.randn(shape)
    return base.to(dtype), [(base + 0.1 * torch.randn(shape)).to(dtype) for _ in range(tasks)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(13, 7), (5,), (), (2, 3, 4)], ids=str)
def test_linear(dtype, shape):
    base, tuned = group(dtype, shape=shape)
    config = MergeConfig("linear", weight=[1.0, 2.0, 3.0])
    got = merge_tensors(base, tuned, config, out_dtype=torch.float64)
    assert relative_error(got.weight, sum(w * t.double() for w, t in zip([1, 2, 3], tuned, strict=True)) / 6) < 1e-6
    assert got.report.weights == pytest.approx([1 / 6, 2 / 6, 3 / 6])


def test_linear_does_not_use_the_base():
    base, tuned = group()
    config = MergeConfig("linear")
    assert same_bits(merge_tensors(base, tuned, config).weight, merge_tensors(tuned[0], tuned, config).weight)


def test_linear_without_normalisation():
    base, tuned = group(tasks=2)
    got = merge_tensors(base, tuned, MergeConfig("linear", weight=[1.0, -0.5], normalize=False))
    assert relative_error(got.weight, tuned[0].double() - 0.5 * tuned[1].double()) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(13, 7), (5,), (), (2, 3, 4)], ids=str)
def test_task_arithmetic(dtype, shape):
    base, tuned = group(dtype, shape=shape)
    config = MergeConfig("task_arithmetic", weight=[1.0, 0.5, 0.25], alpha=0.4)
    got = merge_tensors(base, tuned, config, out_dtype=torch.float64)
    deltas = [t.double() - base.double() for t in tuned]
    exact = base.double() + 0.4 * (deltas[0] + 0.5 * deltas[1] + 0.25 * deltas[2])
    assert relative_error(got.weight, exact) < 1e-6


def test_task_arithmetic_normalised_is_the_mean():
    base, tuned = group()
    got = merge_tensors(base, tuned, MergeConfig("task_arithmetic", normalize=True))
    assert relative_error(got.weight, sum(tuned) / 3) < 1e-6


def test_lambda_is_another_name_of_alpha():
    base, tuned = group()
    first = merge_tensors(base, tuned, MergeConfig("task_arithmetic", alpha=0.3)).weight
    second = merge_tensors(base, tuned, MergeConfig("task_arithmetic", **{"lambda": 0.3})).weight
    assert same_bits(first, second)


@pytest.mark.parametrize("method", ["linear", "task_arithmetic"])
def test_weights_that_cancel_cannot_be_normalised(method):
    base, tuned = group(tasks=2)
    with pytest.raises(ConfigError, match="sum to 0"):
        merge_tensors(base, tuned, MergeConfig(method, weight=[1.0, -1.0], normalize=True))


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare_linear", "della_linear", "breadcrumbs"])
def test_weights_that_are_all_zero_keep_the_base(method):
    """A gradient of weights may begin at 0; mergekit keeps the base there, too."""
    base, tuned = group(tasks=2)
    got = merge_tensors(base, tuned, MergeConfig(method, weight=[0.0, 0.0], normalize=True))
    assert same_bits(got.weight, base)
    assert same_bits(elect_and_sum(base, tuned, [0.0, 0.0], normalize=True), base)


def test_averages_of_no_weight_are_refused():
    base, tuned = group(tasks=2)
    with pytest.raises(ConfigError, match="sum to 0"):
        merge_tensors(base, tuned, MergeConfig("linear", weight=[0.0, 0.0]))


def test_untouched_elements_are_the_base_s_bit_for_bit():
    base, tuned = group(torch.bfloat16)
    base[3] = -0.0
    for t in tuned:
        t[:6] = base[:6]
    got = merge_tensors(base, tuned, MergeConfig("task_arithmetic")).weight
    assert same_bits(got[:6], base[:6])
