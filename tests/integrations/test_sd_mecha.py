"""Our methods in sd-mecha's recipes. sd-mecha is not a dependency: `make test-integrations` runs this."""

import importlib.util

import pytest
import torch
from safetensors.torch import load_file, save_file

from r_tsvm_kernels import MergeConfig, merge_state_dicts
from r_tsvm_kernels.errors import ConfigError, IntegrationError
from r_tsvm_kernels.integrations import sd_mecha as integration
from r_tsvm_kernels.methods import METHODS

ABSENT = importlib.util.find_spec("sd_mecha") is None
needs_sd_mecha = pytest.mark.skipif(ABSENT, reason="sd-mecha is not installed: run make test-integrations")

TASKS = 3
CASES = {
    "rtsvm": {"alpha": 0.8, "weight": [1.0, 0.5, 2.0], "density": [0.5, 1.0, 0.7], "rank": ["noise", 2, 0.2]},
    "tsvm": {"mode": "fast", "weight": [0.5, 0.5, 0.5]},
    "iso_c": {"alpha": 0.7},
    "iso_cts": {},
    "ties": {"density": [0.4, 0.4, 0.4], "normalize": False},
    "dare_ties": {"density": [0.5, 0.6, 0.7], "seed": 7},
    "della": {"density": [0.5, 0.5, 0.5], "epsilon": [0.2, 0.1, 0.2]},
    "linear": {"weight": [1.0, 2.0, 3.0]},
    "karcher": {"max_iter": 5},
}  # fmt: skip


def test_words_and_numbers_of_models_are_told_apart():
    assert integration._spread("rank", "noise, 2, 0.2", 3, words=True) == ["noise", 2.0, 0.2]
    assert integration._spread("rank", "energy", 3, words=True) == ["energy"] * 3
    with pytest.raises(ConfigError, match="density: expected a number"):
        integration._spread("density", "much", 3)


@pytest.fixture
def methods():
    yield integration.install()
    integration.uninstall()


@needs_sd_mecha
def test_a_changed_decorator_is_an_error_and_registers_nothing(monkeypatch):
    from sd_mecha.extensions import merge_methods

    before = merge_methods.get_all()
    monkeypatch.delattr(merge_methods, "Return")
    with pytest.raises(IntegrationError, match=r"not built as expected .*Return.*tested: 1\.1\.8"):
        integration.install()
    assert merge_methods.get_all() == before


@needs_sd_mecha
def test_install_can_be_repeated_and_undone():
    from sd_mecha.extensions import merge_methods

    before = {method.identifier for method in merge_methods.get_all()}
    first = integration.install()
    assert integration.install() == first
    assert {method.identifier for method in merge_methods.get_all()} == before | METHODS.keys()
    assert {"slerp", "model_stock"} <= before and not before & first.keys()
    integration.uninstall()
    integration.uninstall()
    assert {method.identifier for method in merge_methods.get_all()} == before


def models(tmp_path, dtype=torch.float32):
    """A base and fine-tunes in files: two matrices, a bias and a convolution."""
    shapes = {"block.0.weight": (24, 16), "block.1.weight": (12, 20), "bias": (24,), "conv.weight": (6, 4, 3, 3)}
    base = {name: torch.randn(shape) for name, shape in shapes.items()}
    files = [tmp_path / f"{name}.safetensors" for name in ("base", "a", "b", "c")]
    for file in files:
        shift = 0.1 * (file != files[0])
        save_file({name: (t + shift * torch.randn_like(t)).to(dtype) for name, t in base.items()}, file)
    return files


def ours(files, method, parameters, extra=()):
    loaded = [load_file(file) for file in files]
    schema = METHODS[method].parameters
    own = {name: parameters[name] for name in parameters if schema.is_per_model(name)}
    config = {
        "merge_method": method,
        "models": [{"parameters": {name: own[name][task] for name in own}} for task in range(TASKS)],
        "parameters": {name: value for name, value in parameters.items() if name not in own},
    }
    base, tuned = (loaded[0], loaded[1:]) if METHODS[method].forms_vectors(True) else (loaded[1], loaded[1:])
    return merge_state_dicts(base, tuned, MergeConfig.from_dict(config)).state_dict


def recipe_of(methods, method, files, parameters):
    import sd_mecha

    schema = METHODS[method].parameters
    given = {
        name: ", ".join(map(str, value)) if schema.is_per_model(name) else value for name, value in parameters.items()
    }
    nodes = [sd_mecha.model(file) for file in files]
    return methods[method](*(nodes if METHODS[method].forms_vectors(True) else nodes[1:]), **given)


def merged(recipe):
    import sd_mecha

    result = sd_mecha.merge(recipe, output_dtype=torch.float32)
    return {name: tensor for name, tensor in result.items() if name != "__metadata__"}  # the recipe, as text


@needs_sd_mecha
@pytest.mark.parametrize("method", CASES)
def test_a_recipe_gives_what_our_own_merge_gives(methods, tmp_path, method):
    files = models(tmp_path)
    before = integration.calls().get(method, 0)
    found = merged(recipe_of(methods, method, files, CASES[method]))
    expected = ours(files, method, CASES[method])
    assert integration.calls()[method] == before + len(expected) == before + 4
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-6)
    assert not torch.equal(found["block.0.weight"], load_file(files[0])["block.0.weight"])


@needs_sd_mecha
def test_recipes_can_be_written_read_and_run_into_a_file(methods, tmp_path):
    import sd_mecha

    files = models(tmp_path, torch.float16)
    recipe = recipe_of(methods, "rtsvm", files, CASES["rtsvm"])
    text = sd_mecha.serialize(recipe)
    assert '"rtsvm"' in text and '"1.0, 0.5, 2.0"' in text
    # sd-mecha cannot read back what it writes of models that it does not know by name.
    recipe = sd_mecha.deserialize(text.replace(' model_config="structural"', ""))
    sd_mecha.merge(recipe, output=tmp_path / "out.safetensors", output_dtype=torch.float16)
    expected = ours(files, "rtsvm", CASES["rtsvm"])
    for name, tensor in load_file(tmp_path / "out.safetensors").items():
        torch.testing.assert_close(tensor, expected[name], rtol=2**-9, atol=1e-5)


@needs_sd_mecha
def test_parameters_may_differ_by_tensor_and_methods_combine(methods, tmp_path):
    import sd_mecha

    files = models(tmp_path)
    nodes = [sd_mecha.model(file) for file in files]
    alpha = dict.fromkeys(load_file(files[0]), 0.0) | {"block.0.weight": 1.0}
    found = merged(sd_mecha.weighted_sum(nodes[0], methods["tsvm"](*nodes, alpha=alpha), alpha=0.5))
    base, full = load_file(files[0]), ours(files, "tsvm", {})
    for name, tensor in found.items():
        expected = (base[name] + full[name]) / 2 if name == "block.0.weight" else base[name]
        torch.testing.assert_close(tensor, expected, rtol=1e-6, atol=1e-6)


@needs_sd_mecha
@pytest.mark.parametrize(
    ("given", "message"),
    [({"weight": "1, 2"}, "weight: expected a number, or one for each of the 3 models"),
     ({"density": "much"}, "density: expected a number"), ({"mode": "quick"}, "mode"), ({"rank": "all"}, "rank")],
)  # fmt: skip
def test_mistakes_are_named(methods, tmp_path, given, message):
    import sd_mecha

    nodes = [sd_mecha.model(file) for file in models(tmp_path)]
    with pytest.raises(Exception, match=message):
        merged(methods["rtsvm"](*nodes, **given))
