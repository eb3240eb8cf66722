"""No merge returns values that are not finite, and values beyond the range of a dtype are refused by name."""

import math

import numpy as np
import pytest
import torch
from compare import relative_error
from merging import DTYPES, group, tasks_of

from r_tsvm_kernels import ConfigError, MergeConfig, NonFiniteError, merge_state_dicts, merge_tensors
from r_tsvm_kernels.linalg import Factored
from r_tsvm_kernels.methods import METHODS, Unweighted

ALL = pytest.mark.parametrize("method", sorted(METHODS))
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
SCALED = sorted(name for name, method in METHODS.items() if "alpha" in method.parameters.model_fields)
UNWEIGHTED = {name for name, method in METHODS.items() if issubclass(method.parameters, Unweighted)}
ABSOLUTE = {"nearswap", "ram", "ramplus_tl", "arcee_fusion", "pcb"}  # other values at another scale
WIDE = {torch.float64: torch.float64}  # the dtype that a merge computes in; float32 for all others


def finite_or_refused(base, tuned, config):
    """Return the merged tensor, which must be finite; None where the merge is refused by the tensor's name."""
    try:
        merged = merge_state_dicts({"the.w": base}, [{"the.w": model} for model in tuned], config)
    except (NonFiniteError, ConfigError) as error:
        assert "the.w" in str(error)
        return None
    assert bool(merged.state_dict["the.w"].isfinite().all())
    return merged.state_dict["the.w"]


@EVERY_DTYPE
@pytest.mark.parametrize("method", SCALED)
def test_alpha_beyond_float32(method, dtype):
    base, tuned = group(dtype=dtype, tasks=tasks_of(method, 3))
    got = finite_or_refused(base, tuned, MergeConfig(method, alpha=1e39))
    if dtype != torch.float64:
        assert got is None
    else:
        update = merge_tensors(base, tuned, MergeConfig(method)).weight - base
        assert relative_error(got, 1e39 * update) < 1e-4


@EVERY_DTYPE
@pytest.mark.parametrize("method", SCALED)
@pytest.mark.parametrize("shape", [(24, 17), (61,)], ids=str)
def test_an_update_beyond_the_output_dtype(method, dtype, shape):
    base, tuned = group(shape, dtype=dtype, tasks=tasks_of(method, 3))
    largest = torch.finfo(WIDE.get(dtype, torch.float32)).max
    config = MergeConfig(method, alpha=largest)
    with pytest.raises(NonFiniteError, match=r"the\.w: .*(does not fit|overflows)"):
        merge_tensors(100 * base, [100 * model for model in tuned], config, name="the.w")


@ALL
@EVERY_DTYPE
@pytest.mark.parametrize("weights", [[1e300, 1.0, 1.0], [1e39, -1e39, 1.0], [3e38, 3e38, 3e38]], ids=str)
def test_huge_weights(method, dtype, weights):
    base, tuned = group(dtype=dtype, tasks=tasks_of(method, 3))
    if method not in UNWEIGHTED:
        finite_or_refused(base, tuned, MergeConfig(method, weight=weights[: len(tuned)]))


@ALL
@EVERY_DTYPE
def test_differences_beyond_the_dtype(method, dtype):
    base, tuned = group(dtype=dtype, tasks=tasks_of(method, 2))
    far = 0.9 * torch.finfo(dtype).max
    base[1, 2], tuned[0][1, 2] = far, -far
    got = finite_or_refused(base, tuned, MergeConfig(method))
    if dtype != torch.float16 and METHODS[method].forms_vectors(True):  # float32 holds twice the largest float16
        assert got is None
        with pytest.raises(NonFiniteError, match=r"the\.w of /m/far: differs from the base by inf, above the"):
            models = [{"model": "/m/far"}, {}][: len(tuned)]
            merge_tensors(base, tuned, MergeConfig(method, models=models), name="the.w")
    if got is not None and method == "linear":
        assert relative_error(got, (tuned[0].double() + tuned[1].double()) / 2) < 2e-3
    if got is not None and method == "task_arithmetic":
        assert relative_error(got, sum(tuned).double() - base.double()) < 2e-3


@ALL
def test_values_at_the_edge_of_float64(method):
    base, tuned = group(dtype=torch.float64, tasks=tasks_of(method, 3))
    exact = finite_or_refused(base, tuned, MergeConfig(method))
    scaled = finite_or_refused(1e200 * base, [1e200 * model for model in tuned], MergeConfig(method))
    if scaled is not None and method not in ABSOLUTE:
        assert relative_error(scaled / 1e200 - base, exact - base) < 1e-3


@ALL
def test_parameters_that_are_not_finite_are_refused_at_construction(method):
    schema = METHODS[method].parameters
    numbers = [name for name, info in schema.model_fields.items() if isinstance(_scalar(info.default), float)]
    assert "weight" in numbers
    for name in numbers:
        key = schema.model_fields[name].alias or name
        for bad in (math.nan, math.inf, -math.inf, np.float32("nan"), torch.tensor(math.inf)):
            if name == "outlier_sigma" and float(bad) == math.inf:  # no outliers
                continue
            for make in (schema, lambda **given: MergeConfig(method, parameters=given)):
                with pytest.raises(ConfigError, match=f"{name}|{key}"):
                    make(**{key: bad})
    with pytest.raises(ConfigError, match="weight"):
        MergeConfig(method, weight=np.array([1.0, math.nan]))


def _scalar(default):
    return default[0] if isinstance(default, tuple) else default


@ALL
def test_parameters_from_numpy_and_torch(method):
    base, tuned = group(tasks=tasks_of(method, 3))
    schema = METHODS[method].parameters
    plain = {name: _scalar(info.default) for name, info in schema.model_fields.items()}
    numbers = {name: value for name, value in plain.items() if type(value) in (int, float)}
    want = merge_tensors(base, tuned, MergeConfig(method)).weight
    for convert in (np.float64, torch.tensor, lambda value: np.array(value)):
        given = {name: np.int64(value) if type(value) is int else convert(value) for name, value in numbers.items()}
        assert torch.equal(merge_tensors(base, tuned, MergeConfig(method, parameters=given)).weight, want)
    if method in UNWEIGHTED:
        return
    for weights in (np.array([1.0, 2.0, 0.5]), torch.tensor([1.0, 2.0, 0.5]), np.array([2, 2, 2])):
        weights = weights[: len(tuned)]
        got = merge_tensors(base, tuned, MergeConfig(method, weight=weights)).weight
        same = MergeConfig(method, weight=[float(weight) for weight in weights])
        assert torch.equal(got, merge_tensors(base, tuned, same).weight)
    twos = merge_tensors(base, tuned, MergeConfig(method, weight=[2.0] * len(tuned))).weight
    assert torch.equal(merge_tensors(base, tuned, MergeConfig(method, weight=2)).weight, twos)


@ALL
def test_updates_that_overflow_when_they_are_formed(method):
    base = torch.full((12, 9), 3e38)
    update = Factored(torch.full((12, 1), 1e20), torch.full((1, 9), 1e18))
    message = "the base plus its update overflows float32"
    if method == "iso_c":  # spreads it over all singular directions
        assert bool(merge_tensors(base, [update] * 2, method).weight.isfinite().all())
        return
    if METHODS[method].factored(MergeConfig(method).options(tasks_of(method, 2))):
        message = "merged values are NaN or infinite: the merge overflows float32"
    with pytest.raises(NonFiniteError, match=rf"the\.w.*: .*{message}"):
        merge_tensors(base, [update] * tasks_of(method, 2), method, name="the.w")


def test_a_scale_that_is_not_finite():
    with pytest.raises(ConfigError, match="scale must be a finite number, got nan"):
        Factored(torch.ones(12, 1), torch.ones(1, 9), math.nan)


def test_weights_whose_sum_overflows_are_normalized_right():
    base, tuned = group(dtype=torch.float64, tasks=2)
    got = merge_tensors(base, tuned, MergeConfig("linear", weight=[1.5e308, 0.5e308])).weight
    assert relative_error(got, 0.75 * tuned[0] + 0.25 * tuned[1]) < 1e-12
