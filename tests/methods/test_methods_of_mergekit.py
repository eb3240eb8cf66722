"""nuslerp, nearswap, arcee_fusion, ram, ramplus_tl and passthrough against NumPy in float64."""

import numpy as np
import pytest
import torch
from compare import relative_error, same_bits
from merging import DTYPES, SHAPES, doubles, group, merge, update_error

from r_tsvm_kernels import ConfigError, MergeConfig, merge_state_dicts, merge_tensors
from r_tsvm_kernels.methods import piecewise

EVERY = pytest.mark.parametrize("dtype", DTYPES, ids=str)
SHAPED = pytest.mark.parametrize("shape", SHAPES, ids=str)


@pytest.fixture(params=[1 << 15, 10], ids=["one piece", "pieces"])
def piece(request, monkeypatch):
    monkeypatch.setattr(piecewise, "tile_elements", lambda device: request.param)


# --- nearswap


def nearswap(base, tuned, t=1e-4):
    delta = tuned[0] - base
    return base + np.clip(t / np.maximum(np.abs(delta), 1e-6), 0, 1) * delta


@EVERY
@SHAPED
@pytest.mark.parametrize("t", [0.0, 5e-7, 1e-4, 0.02, 10.0])
def test_nearswap(shape, dtype, t, piece):
    base, tuned = group(shape, 1, dtype)
    got = merge("nearswap", base, tuned, t=t)
    exact = nearswap(*doubles(base, tuned), t)
    assert update_error(got, base, exact) < 1e-5 or np.abs(got.double().numpy() - exact).max() < 1e-6
    if t == 0:
        assert same_bits(got, base.to(got.dtype))


def test_nearswap_takes_over_what_is_near_and_cuts_the_rest():
    base, model = torch.tensor([0.0, 0.0, 0.0]), torch.tensor([0.01, -5.0, 0.2])
    assert torch.allclose(merge("nearswap", base, [model], t=0.1), torch.tensor([0.01, -0.1, 0.1]))
    with pytest.raises(ConfigError, match=r"t: .*greater than or equal to 0"):
        MergeConfig("nearswap", t=-1)


# --- ram


def ram(base, tuned, epsilon=1e-5, gains=None):
    deltas = np.array([model - base for model in tuned])
    active = np.abs(deltas) > epsilon
    count = active.sum(0)
    gains = np.array(gains or [1.0] * len(tuned)).reshape(-1, *[1] * base.ndim)
    share = np.where(count == 1, gains, 1 / np.maximum(count, 1))
    return base + (active * deltas * share).sum(0)


def gains_of(base, tuned, r=0.1, alpha=0.2, epsilon=1e-5):
    active = np.abs(np.array([model - base for model in tuned])) > epsilon
    count = active.sum(0)
    found = []
    for own in active:
        shared, unique = (own & (count > 1)).sum(), (own & (count == 1)).sum()
        found.append(1 + r * min(max(shared / max(unique, epsilon), 0), alpha))
    return found


def sparse(shape, tasks, dtype):
    """Task vectors that change some elements alone and share others."""
    base, tuned = group(shape, tasks, dtype)
    generator = torch.Generator().manual_seed(1)
    return base, [torch.where(torch.rand(shape, generator=generator) < 0.4, model, base) for model in tuned]


@EVERY
@SHAPED
@pytest.mark.parametrize("tasks", [1, 2, 5])
@pytest.mark.parametrize("options", [{}, {"epsilon": 0.02}, {"epsilon": 0.0}], ids=str)
def test_ram(shape, dtype, tasks, options, piece):
    base, tuned = sparse(shape, tasks, dtype)
    assert update_error(merge("ram", base, tuned, **options), base, ram(*doubles(base, tuned), **options)) < 1e-5


@EVERY
@SHAPED
@pytest.mark.parametrize("tasks", [1, 2, 5])
@pytest.mark.parametrize("options", [{}, {"r": 0.8, "alpha": 3.0}, {"epsilon": 0.02}], ids=str)
def test_ramplus_tl(shape, dtype, tasks, options, piece):
    base, tuned = sparse(shape, tasks, dtype)
    exact = doubles(base, tuned)
    gains = gains_of(*exact, **options)
    want = ram(*exact, epsilon=options.get("epsilon", 1e-5), gains=gains)
    assert update_error(merge("ramplus_tl", base, tuned, **options), base, want) < 1e-5
    report = merge_tensors(base, tuned, "ramplus_tl", **options).report
    assert report.weights == pytest.approx(gains)


def test_ramplus_without_gain_is_ram():
    base, tuned = sparse((24, 17), 3, torch.float32)
    assert same_bits(merge("ramplus_tl", base, tuned, r=0.0), merge("ram", base, tuned))


def test_a_task_without_elements_of_its_own_has_the_largest_ratio():
    base, shared = torch.zeros(3), torch.tensor([1.0, 1.0, 0.0])
    report = merge_tensors(base, [shared, torch.tensor([1.0, 1.0, 1.0]), base], "ramplus_tl", r=1.0, alpha=5.0).report
    assert report.weights == [6.0, 3.0, 1.0]


# --- arcee_fusion


def softmax(x):
    wide = np.exp(x - x.max(-1, keepdims=True))
    return wide / wide.sum(-1, keepdims=True) + 1e-8


def fusion_scores(base, model):
    base, model = (np.atleast_1d(x) for x in (base, model))
    p, q = softmax(model), softmax(base)
    return np.abs(model - base) * np.maximum((p * np.log(p / q)).sum(-1, keepdims=True), 0)


def arcee_fusion(base, tuned):
    scores = fusion_scores(base, tuned[0])
    low, median, high = (np.sort(scores, axis=None)[int(f * (scores.size - 1))] for f in (0.25, 0.5, 0.75))
    chosen = (scores >= median + 1.5 * (high - low)).reshape(base.shape)
    return base + chosen * (tuned[0] - base)


@pytest.mark.parametrize("shape", [(24, 17), (61,), (1, 7), (5, 1), (), (3, 5, 7), (300, 40)], ids=str)
@EVERY
def test_arcee_fusion(shape, dtype):
    base, tuned = group(shape, 1, dtype, seed=3)
    exact = doubles(base, tuned)
    got, want = merge("arcee_fusion", base, tuned), arcee_fusion(*exact)
    # Elements whose importance ties with the threshold up to rounding may fall on either side.
    scores = fusion_scores(*exact[:1], exact[1][0])
    close = np.isclose(got.double().numpy(), want, rtol=1e-6, atol=1e-7)
    assert (~close).sum() <= max(1, scores.size // 500)
    changed = float((got != base.to(got.dtype)).double().mean())
    assert changed < 0.35 or scores.size < 20


def test_equal_models_are_unchanged():
    base, _ = group((24, 17))
    for method in ("arcee_fusion", "nearswap", "ram", "ramplus_tl"):
        assert same_bits(merge(method, base, [base.clone()]), base)


# --- nuslerp


def nuslerp(base, tuned, weights, relative=True, flatten=True, columns=False):
    x, y = (model - (base if relative else 0) for model in tuned)
    if flatten:
        x, y = x.reshape(1, -1), y.reshape(1, -1)
    elif columns:
        x, y = np.moveaxis(x, 0, -1), np.moveaxis(y, 0, -1)
    total = sum(weights)
    u = 0.5 if abs(total) < 1e-6 else weights[1] / total

    def unit(v):
        norm = np.linalg.norm(v, axis=-1, keepdims=True)
        return v / np.where(norm > 0, norm, 1)

    cosine = np.clip((unit(x) * unit(y)).sum(-1, keepdims=True), -1, 1)
    parallel = 1 - cosine**2 <= 1e-16
    angle = np.where(parallel, 1, np.arccos(cosine))
    circle = (np.sin((1 - u) * angle) * x + np.sin(u * angle) * y) / np.sin(angle)
    found = np.where(parallel, (1 - u) * x + u * y, circle)
    if columns and not flatten:
        found = np.moveaxis(found, -1, 0)
    return found.reshape(base.shape) + (base if relative else 0)


FORMS = {
    "whole": {},
    "rows": {"nuslerp_flatten": False},
    "columns": {"nuslerp_flatten": False, "nuslerp_row_wise": True},
}


@EVERY
@pytest.mark.parametrize("shape", [(24, 17), (61,), (3, 5, 7), (1, 7)], ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.3, 0.9], [2.0, -0.5], [1.0, -1.0]], ids=str)
def test_nuslerp(shape, dtype, form, relative, weights):
    base, tuned = group(shape, 2, dtype)
    got = merge("nuslerp", base, tuned, weights=weights, relative=relative, **FORMS[form])
    flatten, columns = form == "whole" or len(shape) < 2, form == "columns"
    want = nuslerp(*doubles(base, tuned), weights, relative, flatten, columns)
    assert relative_error(got.double() - base.double(), torch.as_tensor(want) - base.double()) < 2e-5


def test_nuslerp_without_a_base_interpolates_the_models():
    base, tuned = group((24, 17), 2)
    config = MergeConfig("nuslerp", weight=[0.3, 0.9])
    want = merge_tensors(base, tuned, MergeConfig("nuslerp", weight=[0.3, 0.9], relative=False)).weight
    assert same_bits(merge_tensors(None, tuned, config).weight, want)
    got = merge_state_dicts(None, [{"w": model} for model in tuned], config).state_dict["w"]
    assert same_bits(got, want)
    assert not same_bits(merge_tensors(base, tuned, config).weight, want)


@pytest.mark.parametrize("form", FORMS)
def test_nuslerp_of_zeros_and_parallel_vectors(form):
    base, (model, _) = group((6, 5), 2)
    got = merge("nuslerp", base, [base.clone(), model], weights=[1.0, 1.0], **FORMS[form])
    # A vector of zeros is at a right angle to all others, as in mergekit.
    assert relative_error(got - base, (model - base) * np.sin(np.pi / 4)) < 1e-5
    got = merge("nuslerp", torch.zeros(6, 5), [model, 3 * model], weights=[1.0, 1.0], **FORMS[form])
    assert relative_error(got, 2 * model) < 1e-5
    got = merge("nuslerp", base, [base.clone(), base.clone()], weights=[1.0, 1.0], **FORMS[form])
    assert relative_error(got, base) < 1e-6


# --- passthrough


@EVERY
@SHAPED
def test_passthrough(shape, dtype):
    base, tuned = group(shape, 1, dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert same_bits(merge("passthrough", base, tuned), tuned[0].to(wide))
    assert same_bits(merge("passthrough", base, tuned, scale=0.5), 0.5 * tuned[0].to(wide))
    assert same_bits(merge_tensors(None, tuned, "passthrough").weight, tuned[0])


@pytest.mark.parametrize("method", ["passthrough", "nearswap", "arcee_fusion", "ram", "ramplus_tl"])
def test_methods_without_weights(method):
    base, tuned = group((4, 3), 1)
    with pytest.raises(ConfigError, match="has no weights"):
        merge_tensors(base, tuned, MergeConfig(method, weight=[0.5]))
