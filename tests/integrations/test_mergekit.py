"""mergekit with our backend. mergekit is not a dependency: `make test-integrations` runs this where it is installed."""

import importlib.util
import re
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch

import r_tsvm_kernels
from r_tsvm_kernels.cli import main
from r_tsvm_kernels.errors import IntegrationError
from r_tsvm_kernels.integrations import mergekit as integration
from r_tsvm_kernels.methods import METHODS
from r_tsvm_kernels.ops import random_mask

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.filterwarnings("ignore")  # mergekit and transformers warn about many things of their own
ABSENT = importlib.util.find_spec("mergekit") is None
needs_mergekit = pytest.mark.skipif(ABSENT, reason="mergekit is not installed: run make test-integrations")

SHAPE, TASKS = (48, 64), 3
SPARSE = {"density": 0.3, "weight": [0.7, -0.2, 0.5]}
CASES = {
    "task_arithmetic": {"weight": [0.7, -0.2, 0.5], "lambda": 0.8},
    "ties": SPARSE,
    "dare_ties": SPARSE,
    "dare_linear": SPARSE | {"normalize": True},
    "breadcrumbs": SPARSE | {"gamma": 0.05, "rescale": True},
    "breadcrumbs_ties": SPARSE | {"gamma": 0.05, "int8_mask": True},
    "della": SPARSE | {"epsilon": 0.1},
    "della_linear": SPARSE | {"epsilon": 0.1, "rescale": False},
}
# Unit in the last place; mergekit draws and applies random masks of float64 tensors in float32.
PRECISION = {torch.float64: 1e-6, torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}


@pytest.fixture
def installed():
    integration.install()
    yield
    integration.uninstall()


# --- absent or unexpected versions ---------------------------------------------------------------------


def test_a_command_without_mergekit_says_what_to_install(found_version, capsys):
    found_version(None)
    assert main(["mergekit", "yaml", "recipe.yml", "out"]) == 2
    assert "mergekit is not installed" in capsys.readouterr().err


@needs_mergekit
def test_a_missing_function_is_an_error_and_changes_nothing(monkeypatch):
    import mergekit.sparsify
    from mergekit.merge_methods import registered_methods

    before = registered_methods(), mergekit.sparsify.magnitude
    monkeypatch.delattr(mergekit.sparsify, "bernoulli")
    with pytest.raises(IntegrationError, match=r"not built as expected .*bernoulli.*tested: 0\.1\.5"):
        integration.install()
    assert (registered_methods(), mergekit.sparsify.magnitude) == before


@needs_mergekit
def test_install_can_be_repeated_and_undone():
    from mergekit.merge_methods import registered_methods

    from r_tsvm_kernels.integrations.mergekit.patches import REPLACEMENTS

    def state():
        return registered_methods(), [getattr(owner, name) for owner, name, _ in REPLACEMENTS]

    methods, functions = state()
    for accelerate in (True, False, True, True):
        integration.install(accelerate)
        assert {m.spec.name for m in registered_methods()} - {m.spec.name for m in methods} >= {"tsvm", "rtsvm"}
        assert all((new is old) != accelerate for new, old in zip(state()[1], functions, strict=True))
    integration.uninstall()
    integration.uninstall()
    assert state() == (methods, functions)


# --- mergekit's methods on our kernels ---------------------------------------------------------------------------


def inputs(dtype):
    """A base and task vectors none of whose magnitudes are equal: mergekit may keep any of equal ones."""
    tasks = []
    for _ in range(TASKS):
        if dtype in (torch.float64, torch.float32):
            tasks.append(torch.randn(SHAPE, dtype=dtype))
        else:  # half the numbers of the dtype below 1, with random signs
            bits = torch.arange(0x3800 - SHAPE[0] * SHAPE[1], 0x3800, dtype=torch.int16)
            values = bits[torch.randperm(len(bits))].view(dtype).view(SHAPE)
            tasks.append(values * (torch.randint(0, 2, SHAPE) * 2 - 1).to(dtype))
    base = torch.randn(SHAPE, dtype=dtype) if dtype.itemsize > 2 else torch.zeros(SHAPE, dtype=dtype)
    return [base, *(base + task for task in tasks)]


def merged(method, tensors, seed=5):
    from mergekit.merge_methods import merge_tensors

    torch.manual_seed(seed)
    return merge_tensors(tensors, method, parameters=CASES[method], base_index=0)


def draw_like_us(probabilities):
    seed, mask = int(torch.randint(2**63 - 1, ())), torch.zeros(probabilities.shape, dtype=torch.bool)
    for probability in probabilities.unique():
        where = probabilities == probability
        mask[where] = random_mask(mask.shape, float(probability), seed=seed)[where]
    return mask.to(probabilities.dtype)


@needs_mergekit
@pytest.mark.parametrize("dtype", PRECISION, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("method", CASES)
def test_the_merge_is_mergekits_in_float64(method, dtype, monkeypatch):
    tensors = inputs(dtype)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "bernoulli", draw_like_us)
        expected = merged(method, [tensor.double() for tensor in tensors])
    integration.install()
    before = integration.calls()["elect_and_sum"] if integration.calls() else 0
    ours = merged(method, tensors)
    integration.uninstall()
    assert ours.dtype == dtype and integration.calls()["elect_and_sum"] > before
    # Sums may cancel: errors are relative to the inputs.
    scale = max(float(tensor.double().abs().max()) for tensor in tensors)
    precision = PRECISION[dtype]
    assert not torch.equal(ours, tensors[0])
    torch.testing.assert_close(ours.double(), expected, rtol=precision, atol=1e-6 * scale)


@needs_mergekit
@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_differences_of_half_precision_are_not_rounded(method, dtype, monkeypatch):
    base = torch.randn(SHAPE)
    tensors = [base.to(dtype), *((base + 0.1 * torch.randn(SHAPE)).to(dtype) for _ in range(TASKS))]
    argsort = torch.argsort
    with monkeypatch.context() as patch:  # many magnitudes are equal: mergekit, too, is to keep the first
        patch.setattr(torch, "argsort", lambda x, descending: argsort(x, descending=descending, stable=True))
        expected = merged(method, [tensor.double() for tensor in tensors])
        theirs = merged(method, tensors)
    integration.install()
    ours = merged(method, tensors)
    integration.uninstall()
    torch.testing.assert_close(ours.double(), expected, rtol=PRECISION[dtype] / 2, atol=1e-6)
    assert (ours.double() - expected).norm() < (theirs.double() - expected).norm()


@needs_mergekit
@pytest.mark.parametrize("density", [0.0, 0.004, 0.3, 0.77, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_counts_are_exact_and_the_first_of_equal_magnitudes_are_kept(installed, density, dtype):
    from mergekit import sparsify

    x = torch.full((16, 32), 2.0, dtype=dtype)
    x.view(-1)[1::2] *= -1
    for kept, first in ((sparsify.magnitude(x, density), 0), (sparsify.magnitude_outliers(x, density, gamma=0.3), 153)):
        count = max(int(density * 512), int(density > 0))
        first = min(first, 512 - count)  # outliers are spared rather than too few kept
        assert kept.count_nonzero() == count
        assert torch.equal(kept.view(-1)[first : first + count], x.view(-1)[first : first + count])


@needs_mergekit
def test_random_masks_follow_the_seed(installed):
    tensors = inputs(torch.float32)
    for method in ("dare_ties", "della"):
        assert torch.equal(merged(method, tensors, seed=1), merged(method, tensors, seed=1))
        assert not torch.equal(merged(method, tensors, seed=1), merged(method, tensors, seed=2))


@needs_mergekit
def test_rows_of_one_element_survive_della(installed):
    from mergekit import sparsify

    x = torch.ones(4096, 1)
    kept = sparsify.della_magprune(x, 0.5, 0.1)  # mergekit divides 0 by 0 here
    assert 1700 < kept.count_nonzero() < 2400


@needs_mergekit
@pytest.mark.parametrize("method", CASES)
def test_gradients_and_values_that_are_not_finite_are_left_to_mergekit(method):
    tensors = inputs(torch.float32)
    tensors[1][3, 4] = torch.inf
    expected = merged(method, tensors) if "della" not in method and "dare" not in method else None
    integration.install()
    try:
        result = merged(method, tensors)
        tensors[2].requires_grad_()
        assert merged(method, tensors).requires_grad
    finally:
        integration.uninstall()
    assert not result.isfinite().all()
    if expected is not None:
        torch.testing.assert_close(result, expected, equal_nan=True)


# --- our methods in mergekit -------------------------------------------------------------------------------------


@needs_mergekit
def test_our_methods_take_the_parameters_of_our_recipes(installed):
    from mergekit.merge_methods import get, merge_tensors

    known = {parameter.name for parameter in get("rtsvm").spec.parameters}
    assert known == METHODS["rtsvm"].parameters.names().keys() - {"exclude_keys"}
    tensors = inputs(torch.float32)
    parameters = {"weight": [1.0, 0.5, 2.0], "density": [0.5, 1.0, 0.2], "rank": 5.0, "lambda": 0.7, "mode": "fast"}
    from r_tsvm_kernels import MergeConfig
    from r_tsvm_kernels import merge_tensors as native

    ours = merge_tensors(tensors, "rtsvm", parameters=parameters, base_index=0)
    models = [{"parameters": {key: parameters[key][task] for key in ("weight", "density")}} for task in range(TASKS)]
    common = {key: parameters[key] for key in ("rank", "lambda", "mode")}
    config = MergeConfig.from_dict({"merge_method": "rtsvm", "models": models, "parameters": common})
    assert torch.equal(ours, native(tensors[0], tensors[1:], config).weight)
    with pytest.raises(ValueError, match="exact"):
        merge_tensors(tensors, "rtsvm", parameters={"mode": "quick"}, base_index=0)
    assert torch.equal(merge_tensors(tensors[:1], "tsvm", base_index=0), tensors[0])


@needs_mergekit
def test_a_method_without_a_base_averages_all_models(installed):
    from mergekit.merge_methods import merge_tensors

    from r_tsvm_kernels.integrations.mergekit.methods import RegisteredMethod

    tensors, parameters = inputs(torch.float32), {"weight": [1.0, 2.0, 3.0, 4.0]}
    ours = merge_tensors(tensors, RegisteredMethod(METHODS["linear"]), parameters=parameters)
    torch.testing.assert_close(ours, merge_tensors(tensors, "linear", parameters=parameters))


# --- the entry point -----------------------------------------------------------------------------------------------


@needs_mergekit
def test_the_entry_point_gives_methods_that_mergekit_takes(monkeypatch):
    """What mergekit would do, with its public `register`: the lines of docs/integrations.md."""
    from mergekit.merge_methods import merge_tensors, registered_methods, registry

    table = (ROOT / "pyproject.toml").read_text().split('[project.entry-points."mergekit.merge_methods"]\n')[1]
    plugins = [EntryPoint(*re.match(r'(\w+) = "([\w.:]+)"', table).groups(), "mergekit.merge_methods")]
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: plugins if "mergekit." in group else [])
    page = (ROOT / "docs" / "integrations.md").read_text()
    lines = re.search(r"```python\n(from importlib.metadata import entry_points\n.*?)```", page, re.DOTALL)[1]
    before = {method.spec.name for method in registered_methods()}
    try:
        exec(lines, {})  # our own text
        added = {method.spec.name for method in registered_methods()} - before
        assert added == METHODS.keys() - before and {"tsvm", "rtsvm"} <= added
        tensors = inputs(torch.float32)
        result = merge_tensors(tensors, "tsvm", parameters={"alpha": 0.5}, base_index=0)
        expected = r_tsvm_kernels.merge_tensors(tensors[0], tensors[1:], "tsvm", alpha=0.5).weight
        assert torch.equal(result, expected)
    finally:
        for name in METHODS.keys() - before:
            registry._METHODS.pop(name, None)
