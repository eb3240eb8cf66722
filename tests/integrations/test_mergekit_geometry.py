"""mergekit's methods of angles, lengths and variances on our kernels, against mergekit itself in float64."""

import importlib.util

import pytest
import torch

from r_tsvm_kernels.integrations import mergekit as integration

ABSENT = importlib.util.find_spec("mergekit") is None
pytestmark = [
    pytest.mark.skipif(ABSENT, reason="mergekit is not installed: run make test-integrations"),
    pytest.mark.filterwarnings("ignore"),  # mergekit and transformers warn about many things of their own
]

SHAPE, TASKS = (48, 64), 3
# Name: method, number of models, whether there is a base, parameters, our kernel.
CASES = {
    "sce": ("sce", 3, True, {}, "sce"),
    "sce-selected": ("sce", 3, True, {"select_topk": 0.3}, "spread_select"),
    "sce-int8": ("sce", 2, True, {"select_topk": 0.61, "int8_mask": True}, "sce"),
    "model_stock": ("model_stock", 3, True, {}, "elect_and_sum"),
    "model_stock-two": ("model_stock", 2, True, {}, "elect_and_sum"),
    "model_stock-rows": ("model_stock", 3, True, {"filter_wise": True}, "gram_matrix"),
    "karcher": ("karcher", 3, False, {}, "elect_and_sum"),
    "karcher-two": ("karcher", 2, False, {"max_iter": 3}, "elect_and_sum"),
    "karcher-exact": ("karcher", 4, False, {"max_iter": 50, "tol": 1e-9}, "elect_and_sum"),
    "multislerp": ("multislerp", 3, False, {"weight": [0.5, 0.2, 0.7]}, "elect_and_sum"),
    "multislerp-base": ("multislerp", 3, True, {"weight": [0.5, 0.2, 0.7]}, "elect_and_sum"),
    "multislerp-raw": (
        "multislerp", 2, True, {"weight": [0.5, 0.2], "normalize_weights": False}, "elect_and_sum"
    ),
    "nuslerp": ("nuslerp", 2, False, {"weight": [0.3, 0.9]}, "elect_and_sum"),
    "nuslerp-base": ("nuslerp", 2, True, {"weight": [0.3, 0.9]}, "elect_and_sum"),
    "slerp": ("slerp", 1, True, {"t": 0.3}, "elect_and_sum"),
}  # fmt: skip
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
each_case = pytest.mark.parametrize("case", CASES)


@pytest.fixture
def installed():
    integration.install()
    yield
    integration.uninstall()


def inputs(case, dtype=torch.float32, scale=1.0, shape=SHAPE):
    """Models with something in common, and the base in front where the case has one."""
    _, count, has_base, _, _ = CASES[case]
    base, shared = torch.randn(shape), 0.5 * torch.randn(shape)
    tuned = [base + scale * (shared + torch.randn(shape)) for _ in range(count)]
    return [tensor.to(dtype) for tensor in ([base] * has_base + tuned)]


def merged(case, tensors, **changes):
    from mergekit.merge_methods import merge_tensors

    method, _, has_base, parameters, _ = CASES[case]
    return merge_tensors(tensors, method, parameters=parameters | changes, base_index=0 if has_base else None)


def doubles(tensors):
    return [tensor.double() for tensor in tensors]


def distance(got, exact):
    return float((got.double() - exact).norm() / exact.norm())


@each_case
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_the_merge_is_mergekits_in_float64(case, dtype):
    tensors = inputs(case, dtype)
    exact, theirs = merged(case, doubles(tensors)), merged(case, tensors)
    integration.install()
    before = integration.calls()
    ours = merged(case, tensors)
    after = integration.calls()
    integration.uninstall()
    kernel = CASES[case][-1]
    assert after[kernel] > before.get(kernel, 0)
    assert ours.dtype == dtype and not torch.equal(ours, tensors[0])
    # A tensor of the dtype can be no nearer than its rounding; sums of float32 err by some units.
    rounding = distance(exact.to(dtype), exact)
    assert distance(ours, exact) <= 1.01 * rounding + (1e-12 if dtype == torch.float64 else 5e-7)
    if dtype != torch.float64:
        assert distance(ours, exact) <= 2 * distance(theirs, exact)


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5, 2, 2)], ids=str)
@each_case
def test_other_shapes(case, shape, installed):
    tensors = inputs(case, shape=shape)
    ours = merged(case, tensors)
    integration.uninstall()
    exact = merged(case, doubles(tensors))
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-6)


@each_case
def test_views_of_other_tensors_are_read_and_not_changed(case, installed):
    tensors = [tensor.mT.contiguous().mT for tensor in inputs(case)]
    copies = [tensor.clone() for tensor in tensors]
    torch.testing.assert_close(merged(case, tensors), merged(case, [t.contiguous() for t in tensors]))
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(tensors, copies, strict=True))


@each_case
def test_gradients_and_values_that_are_not_finite_are_left_to_mergekit(case):
    tensors = inputs(case)
    tensors[-1][3, 4] = torch.inf
    expected = merged(case, tensors)
    integration.install()
    try:
        torch.testing.assert_close(merged(case, tensors), expected, rtol=0, atol=0, equal_nan=True)
        tensors = inputs(case)
        tensors[-1].requires_grad_()
        before = integration.calls()
        assert merged(case, tensors).requires_grad
        assert integration.calls() == before
    finally:
        integration.uninstall()


# --- where mergekit has rules of its own: ours are the same inside it --------------------------------------------


@each_case
@pytest.mark.parametrize("scale", [1e-5, 1e-3])
def test_updates_as_small_as_those_of_real_fine_tunes(case, scale):
    # SCE weighs all tasks alike where their mean squares sum to less than 1e-6; Model Stock takes no product of norms
    # below 1e-6; SLERP is linear above a cosine of 0.9995; Karcher leaves out models within `tol` of the mean.
    tensors = doubles(inputs(case, scale=scale))
    tensors[-1] += 2 * (tensors[-1] - tensors[0]) if CASES[case][2] else 0
    exact = merged(case, tensors)
    integration.install()
    ours = merged(case, tensors)
    integration.uninstall()
    update = float((exact - tensors[0]).norm())
    assert float((ours - exact).norm()) <= 1e-4 * update


def test_sce_without_anything_to_select_is_the_base(installed):
    tensors = inputs("sce")
    assert torch.equal(merged("sce", tensors, select_topk=0.0), tensors[0])
    assert torch.equal(merged("sce", [tensors[0], tensors[1], tensors[1]], select_topk=0.5), tensors[0])
    # One model has no variance: mergekit selects nothing.
    assert torch.equal(merged("sce", tensors[:2], select_topk=0.5), tensors[0])


@pytest.mark.parametrize("share", [1e-9, 1e-3])
def test_sce_with_tasks_of_very_different_size(share):
    base, first, second = torch.zeros(3, 8, 8, dtype=torch.float64)
    first[:4], second[4:] = torch.randn(4, 8), share**0.5 * torch.randn(4, 8)
    expected = merged("sce-int8", [base, first, second], select_topk=1.0)
    integration.install()
    ours = merged("sce-int8", [base, first, second], select_topk=1.0)
    integration.uninstall()
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=0)


def test_model_stock_of_opposing_updates():
    base, first = torch.zeros(4, 6), torch.randn(4, 6)
    for rows in ("model_stock", "model_stock-rows"):
        opposing = [base, first, -first + 0.5 * torch.randn(4, 6)]
        expected = merged(rows, doubles(opposing))  # its ratio is negative
        integration.install()
        ours, kept = merged(rows, opposing), merged(rows, [base, first, -first])
        integration.uninstall()
        torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(kept, base)


def test_karcher_takes_models_shorter_than_its_tolerance_for_zero(installed):
    long = torch.randn(SHAPE)
    short = torch.full(SHAPE, 1e-9)
    torch.testing.assert_close(merged("karcher", [long, short]), long / 2, rtol=1e-5, atol=1e-6)
    assert not merged("karcher", [short, short]).any()
    torch.testing.assert_close(merged("karcher", [long, -long]), long)  # they cancel: the first


@pytest.mark.parametrize("case", ["multislerp", "nuslerp"])
def test_directions_that_cancel_are_left_to_mergekit(case, installed):
    x = torch.randn(SHAPE)
    integration.uninstall()
    expected = merged(case, [x, -x], weight=[0.5, 0.5])
    integration.install()
    torch.testing.assert_close(merged(case, [x, -x], weight=[0.5, 0.5]), expected, rtol=1e-5, atol=1e-6)


def test_slerp_of_a_batch_of_tensors(installed):
    from mergekit.merge_methods import merge_state_dicts

    models = [{str(i): torch.randn(5, 9) for i in range(4)} | {"w": torch.randn(7)} for _ in range(2)]
    models[1]["2"] = 1.001 * models[0]["2"]  # along one line: linear
    before = integration.calls()["elect_and_sum"]
    ours = merge_state_dicts(models, "slerp", parameters={"t": 0.4}, base=0)
    assert integration.calls()["elect_and_sum"] == before + 5
    integration.uninstall()
    exact = [{name: tensor.double() for name, tensor in model.items()} for model in models]
    expected = merge_state_dicts(exact, "slerp", parameters={"t": 0.4}, base=0)
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-5, atol=1e-6)


# --- where mergekit loses precision: ours is nearer ---------------------------------------------------------------


@pytest.mark.parametrize("case", ["model_stock", "karcher", "multislerp-base", "nuslerp-base", "sce"])
def test_half_precision_norms_and_squares_are_not_rounded(case):
    # mergekit takes norms, products and squares in the dtype of the tensors: squares of 1e-3 underflow in float16.
    tensors = [(0.02 * tensor).to(torch.bfloat16) for tensor in inputs(case, scale=0.3)]
    exact, theirs = merged(case, doubles(tensors)), merged(case, tensors)
    integration.install()
    ours = merged(case, tensors)
    integration.uninstall()
    assert distance(ours, exact) < 0.9 * distance(theirs, exact)
