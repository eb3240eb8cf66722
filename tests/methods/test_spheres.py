"""slerp, multislerp and karcher, against the vectors that the package never forms."""

import numpy as np
import pytest
import torch
from compare import relative_error, same_bits
from hypothesis import given
from hypothesis import strategies as st
from merging import DTYPES, SHAPES, doubles, group, merge, update_error
from safetensors.torch import load_file, save_file

from r_tsvm_kernels import ConfigError, MergeConfig, merge_checkpoints, merge_state_dicts, merge_tensors

TENSORS = [shape for shape in SHAPES if shape != ()]  # scalars are parallel or opposite: see below


def unit(x):
    norm = np.linalg.norm(x)
    return x / norm if norm else x


def slerp(base, tuned, t=0.5):
    """Shoemake, section 3.3."""
    angle = np.arccos(np.clip(np.vdot(unit(base), unit(tuned)), -1, 1))
    if not base.any() or not tuned.any() or np.sin(angle) < 1e-7:
        return (1 - t) * base + t * tuned
    return (np.sin((1 - t) * angle) * base + np.sin(t * angle) * tuned) / np.sin(angle)


def multislerp(base, tuned, weights=None, normalize_weights=True):
    """All the published steps, those in the tangent space too."""
    weights = np.array(weights or [1.0] * len(tuned))
    if normalize_weights:
        weights = weights / weights.sum()
    deltas = [t - base for t in tuned]
    mean = unit(sum(w * unit(d) for w, d in zip(weights, deltas, strict=True)))
    tangent = sum(w * (unit(d) - np.vdot(unit(d), mean) * mean) for w, d in zip(weights, deltas, strict=True))
    size = np.linalg.norm(tangent)
    point = mean * np.cos(size) + tangent * (np.sin(size) / size if size else 1)
    return base + point * sum(w * np.linalg.norm(d) for w, d in zip(weights, deltas, strict=True))


def karcher(tensors, weights=None, max_iter=10, tol=1e-5):
    """Steps along the mean of the logarithms, on the sphere."""
    weights = np.array(weights or [1.0] * len(tensors))
    weights = weights / weights.sum()
    norm = sum(w * np.linalg.norm(x) for w, x in zip(weights, tensors, strict=True))
    points = [(w, unit(x)) for w, x in zip(weights, tensors, strict=True) if x.any()]
    total = sum(w for w, _ in points)
    mean = unit(sum(w * x for w, x in points))
    for _ in range(max_iter):
        step = 0.0
        for w, x in points:
            cosine = np.clip(np.vdot(x, mean), -1, 1)
            rest = x - cosine * mean
            step = step + w / total * np.arctan2(np.linalg.norm(rest), cosine) * unit(rest)
        size = np.linalg.norm(step)
        if size < tol:
            break
        mean = unit(np.cos(size) * mean + np.sin(size) * step / size)
    return norm * mean


def far(shape=(24, 17), tasks=3, dtype=torch.float32, seed=0):
    """Models that have less in common than fine-tunes."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(shape, generator=generator)
    tensors = [shared + torch.randn(shape, generator=generator) for _ in range(1 + tasks)]
    return tensors[0].to(dtype), [tensor.to(dtype) for tensor in tensors[1:]]


@pytest.mark.parametrize("inputs", [group, far])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_slerp_equals_float64(inputs, shape, dtype):
    base, tuned = inputs(shape, 1, dtype)
    for t in (0.0, 0.3, 0.5, 1.0, 1.2):
        got = merge("slerp", base, tuned, t=t)
        exact = doubles(base, tuned)
        assert update_error(got, base, slerp(exact[0], exact[1][0], t)) < 1e-5


@pytest.mark.parametrize("inputs", [group, far])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", TENSORS, ids=str)
@pytest.mark.parametrize("tasks", [1, 2, 3, 8])
def test_multislerp_equals_float64(inputs, shape, dtype, tasks):
    base, tuned = inputs(shape, tasks, dtype)
    assert update_error(merge("multislerp", base, tuned), base, multislerp(*doubles(base, tuned))) < 1e-5


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.5, 1.0, 2.0], [1.0, -0.2, 0.4]], ids=str)
@pytest.mark.parametrize("inputs", [group, far])
def test_multislerp_without_a_base_merges_the_models(inputs, weights, tmp_path):
    base, tuned = inputs((24, 17), 3)
    got = merge("multislerp", None, tuned, weights=weights)
    assert relative_error(got, multislerp(0, doubles(base, tuned)[1], weights)) < 1e-6
    assert same_bits(merge("multislerp", base, tuned, weights=weights, relative=False), got)
    config = MergeConfig("multislerp", weight=weights)
    dicts = [{"w": model} for model in tuned]
    assert same_bits(merge_state_dicts(None, dicts, config).state_dict["w"], got)
    for number, state_dict in enumerate(dicts):
        save_file(state_dict, tmp_path / f"{number}.safetensors")
    models = [{"model": str(tmp_path / f"{i}.safetensors"), "parameters": {"weight": w}} for i, w in enumerate(weights)]
    merge_checkpoints(MergeConfig("multislerp", models=models), tmp_path / "out.safetensors")
    assert same_bits(load_file(tmp_path / "out.safetensors")["w"], got)


def test_a_calibration_needs_a_base():
    _, tuned = group((24, 17), 3)
    with pytest.raises(ConfigError, match="without a base changes none"):
        merge_tensors(None, tuned, MergeConfig("multislerp", calibrate="svc"))


@pytest.mark.parametrize("inputs", [group, far])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", TENSORS, ids=str)
@pytest.mark.parametrize("tasks", [1, 2, 3, 8])
def test_karcher_equals_float64(inputs, shape, dtype, tasks):
    base, tuned = inputs(shape, tasks, dtype)
    got = merge("karcher", base, tuned)
    assert relative_error(got, karcher(doubles(base, tuned)[1])) < 1e-6


@pytest.mark.parametrize("weights", [[0.5, 1.0, 2.0], [1.0, -0.2, 0.4]], ids=str)
def test_weights_equal_float64(weights):
    base, tuned = far()
    exact_base, exact = doubles(base, tuned)
    assert relative_error(merge("karcher", base, tuned, weights=weights), karcher(exact, weights)) < 1e-6
    for normalize in (True, False):
        got = merge("multislerp", base, tuned, weights=weights, normalize_weights=normalize)
        assert update_error(got, base, multislerp(exact_base, exact, weights, normalize)) < 1e-6


def test_karcher_stops_where_it_is_told_to():
    base, tuned = far(tasks=4)
    exact = doubles(base, tuned)[1]
    for max_iter in (0, 1, 3):
        got = merge("karcher", base, tuned, max_iter=max_iter, tol=1e-9, weights=[1.0, 2.0, 3.0, 9.0])
        assert relative_error(got, karcher(exact, [1, 2, 3, 9], max_iter, 1e-9)) < 1e-6


def test_the_karcher_mean_of_two_is_the_middle_of_the_great_circle():
    base, tuned = far(tasks=2, dtype=torch.float64)
    first, second = (t / t.norm() for t in tuned)
    got = merge("karcher", base, [first, second])
    assert relative_error(got, merge("slerp", first, [second])) < 1e-12


def test_slerp_is_exact_where_models_are_close():
    # mergekit and FusionBench interpolate linearly from a cosine of 0.9995 on: the norm then shrinks in between.
    base = torch.randn(40, 50, dtype=torch.float64)
    tuned = base + 0.03 * torch.randn(40, 50, dtype=torch.float64)
    tuned *= base.norm() / tuned.norm()
    assert float((base * tuned).sum() / base.norm() ** 2) > 0.9995
    assert abs(float(merge("slerp", base, [tuned]).norm() / base.norm()) - 1) < 1e-9
    assert abs(float(((base + tuned) / 2).norm() / base.norm()) - 1) > 1e-5


def test_slerp_takes_one_model_and_no_weights():
    with pytest.raises(ConfigError, match="slerp merges the base with 1 fine-tuned model, got 2"):
        MergeConfig("slerp").options(2)
    with pytest.raises(ConfigError, match="slerp has no weights"):
        MergeConfig("slerp", weight=[0.5]).options(1)


def test_tensors_that_have_no_direction():
    base, tuned = group(tasks=3)
    zero = torch.zeros_like(base)
    assert relative_error(merge("slerp", zero, tuned[:1], t=0.25), 0.25 * tuned[0]) < 1e-7
    assert same_bits(merge("slerp", base, [zero], t=1.0), zero)
    assert relative_error(merge("karcher", base, [tuned[0], zero]), 0.5 * tuned[0]) < 1e-6
    assert same_bits(merge("karcher", base, [zero, zero]), zero)
    # mergekit refuses three models that did not touch a tensor: their mean is zero.
    assert same_bits(merge("multislerp", base, [base] * 3), base)
    assert relative_error(merge("multislerp", base, [tuned[0], base]) - base, 0.5 * (tuned[0] - base)) < 1e-5


def test_opposite_directions():
    base, tuned = torch.zeros(9), [torch.ones(9), -torch.ones(9)]
    assert relative_error(merge("karcher", base, tuned), tuned[0]) < 1e-6
    assert relative_error(merge("slerp", tuned[0], tuned[1:], t=0.25), 0.5 * tuned[0]) < 1e-6
    assert float(merge("multislerp", base, tuned).abs().max()) == 0
    assert relative_error(merge("multislerp", base, [2 * tuned[0], tuned[1]]), 0.5 * tuned[0]) < 1e-6
    scalars = torch.tensor(1.0), [torch.tensor(2.0), torch.tensor(-3.0)]
    assert merge("karcher", *scalars) == 2.5
    assert merge("multislerp", torch.tensor(0.0), scalars[1]) == -0.5


def test_untouched_tensors_stay():
    base, _ = group()
    base[0, 0] = -0.0
    assert same_bits(merge("slerp", base, [base]), base)
    assert same_bits(merge("multislerp", base, [base, base]), base)
    assert relative_error(merge("karcher", base, [base, base]), base) < 1e-7


@given(st.permutations(range(3)), st.sampled_from(["multislerp", "karcher"]), st.integers(0, 9))
def test_the_order_of_tasks_does_not_matter(order, method, seed):
    base, tuned = far((9, 13), seed=seed)
    weights = [0.5, 1.0, 1.5]
    plain = merge(method, base, tuned, weights=weights)
    got = merge(method, base, [tuned[i] for i in order], weights=[weights[i] for i in order])
    assert relative_error(got, plain) < 1e-6


@given(st.sampled_from([2.0**-40, 0.25, 8.0, -1.0]), st.sampled_from(["multislerp", "karcher"]), st.integers(0, 9))
def test_scaling_the_models_scales_the_result(c, method, seed):
    # mergekit's karcher takes models of norm below 1e-5 for zero.
    base = torch.zeros(9, 13)
    _, tuned = far((9, 13), seed=seed)
    plain = merge(method, base, tuned)
    assert relative_error(merge(method, base, [c * t for t in tuned]), c * plain) < 1e-6
    assert relative_error(merge("slerp", c * tuned[0], [c * tuned[1]]), c * merge("slerp", tuned[0], [tuned[1]])) < 1e-6
