"""`add_weighted_adapter` on our kernels, for all kinds of LoRA: the sum of the updates as the papers define them.

The truth is computed in float64 from factors and configurations, not from what PEFT says that an update is.
"""

import copy
import math
import re

import pytest
import torch
from torch import nn

from r_tsvm_kernels import ConfigError
from r_tsvm_kernels.errors import AdapterRefusedError
from r_tsvm_kernels.integrations import peft as integration

peft = pytest.importorskip("peft", reason="PEFT is not installed: run make test-integrations")

NAMES, WEIGHTS = ["one", "two", "three"], [0.7, -1.3, 0.4]
RANKS = {"one": 4, "two": 2, "three": 4}
ALPHAS = {"one": 6, "two": 9, "three": 4}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.first, self.second = nn.Embedding(30, 16), nn.Linear(16, 20), nn.Linear(20, 12)
        self.conv, self.point = nn.Conv2d(1, 6, 3), nn.Conv2d(6, 8, 1)

    def forward(self, tokens):
        return self.point(self.conv(self.second(self.first(self.table(tokens)))[:, None]))


LAYERS = ["table", "first", "second", "conv", "point"]


@pytest.fixture(autouse=True)
def installed():
    integration.install()
    yield
    integration.uninstall()


def adapted(own=None, names=NAMES, ranks=RANKS, **common):
    """A network with one adapter per name; `own` are settings of single adapters, `common` those of all."""
    torch.manual_seed(0)
    settings = {"target_modules": LAYERS, "init_lora_weights": False} | common

    def config(name):
        plain = {"r": ranks[name], "lora_alpha": ALPHAS[name]}
        return peft.LoraConfig(**(plain | settings | (own or {}).get(name, {})))

    model = peft.get_peft_model(Net(), config(names[0]), names[0])
    for name in names[1:]:
        model.add_adapter(name, config(name))
    return model


def looked_up(pattern, layer, default):
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", layer)), default)


def truth(model, layer, names=NAMES, weights=WEIGHTS):
    """Return the weighted sum of ``alpha / r * B @ A``, or over ``sqrt(r)``, in the layout of the weight."""
    module = getattr(model.base_model.model, layer)
    total = 0.0
    for name, weight in zip(names, weights, strict=True):
        config = model.peft_config[name]
        if name in module.lora_A:
            A, B = module.lora_A[name].weight, module.lora_B[name].weight
        elif name in module.lora_embedding_A:
            B, A = module.lora_embedding_A[name].T, module.lora_embedding_B[name].T
        else:
            continue
        A, B = A.detach().double(), B.detach().double()
        rank = looked_up(config.rank_pattern, layer, config.r)
        alpha = looked_up(config.alpha_pattern, layer, config.lora_alpha)
        scale = alpha / (math.sqrt(rank) if config.use_rslora else rank)
        if A.ndim == 4:
            total = total + weight * scale * torch.einsum("or,rihw->oihw", B[:, :, 0, 0], A)
        else:
            total = total + weight * scale * B @ A
    return total


def merged_weights(model, adapter):
    """Return the weights with the adapter merged in by PEFT, less those of the base."""
    layers = {layer: getattr(model.base_model.model, layer) for layer in LAYERS}
    before = {name: layer.get_base_layer().weight.detach().clone() for name, layer in layers.items()}
    model.set_adapter(adapter)
    unloaded = copy.deepcopy(model).merge_and_unload()
    return {layer: getattr(unloaded, layer).weight.detach().double() - weight for layer, weight in before.items()}


def assert_right(model, adapter="new", **inputs):
    for layer, update in merged_weights(model, adapter).items():
        exact = truth(model, layer, **inputs)
        assert (update - exact).norm() <= 1e-5 * exact.norm(), layer


RS = {"use_rslora": True}
KINDS = {
    "plain": {},
    "rslora": RS,
    "rslora-first": {"own": {"one": RS}},
    "rslora-second": {"own": {"two": RS}},
    "patterns": {"rank_pattern": {"first": 5, "conv": 3}, "alpha_pattern": {"second": 11, "table": 2}},
    "rslora-patterns": {"rank_pattern": {"first": 5}, "alpha_pattern": {"first": 11, "point": 3}, **RS},
    "other layers": {"own": {"one": {"target_modules": ["first", "table", "point"]}}, **RS},
}


@pytest.mark.parametrize("combination", ["svd", "cat"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_combined_adapter_is_the_sum_of_the_updates(kind, combination):
    model = adapted(**KINDS[kind])
    model.add_weighted_adapter(NAMES, WEIGHTS, "new", combination_type=combination, svd_rank=15)
    assert_right(model)


@pytest.mark.parametrize("kind", ["dare_linear_svd", "magnitude_prune_svd"])
def test_without_pruning_the_other_types_are_the_sum_too(kind):
    names, weights = ["one", "three"], [0.5, 0.5]
    model = adapted(names=names, **RS)
    with pytest.warns(UserWarning, match="nothing is pruned"):
        model.add_weighted_adapter(names, weights, "new", combination_type=kind, density=1.0, svd_rank=8)
    assert_right(model, names=names, weights=weights)


@pytest.mark.parametrize("kind", ["ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd", "ties"])
def test_rslora_is_lora_of_a_larger_alpha(kind):
    names, ranks = ["one", "two"], {"one": 4, "two": 4}
    plain = adapted({name: {"lora_alpha": ALPHAS[name] * 2} for name in names}, names, ranks)
    found = []
    for model in (plain, adapted(names=names, ranks=ranks, **RS)):
        torch.manual_seed(5)
        model.add_weighted_adapter(names, [0.7, -1.3], "new", combination_type=kind, density=0.5)
        found.append(merged_weights(model, "new"))
    for layer, update in found[0].items():
        assert (found[1][layer] - update).norm() <= 1e-5 * update.norm(), layer


@pytest.mark.parametrize("combination", ["svd", "linear", "cat"])
@pytest.mark.parametrize("common", [{}, RS], ids=["plain", "rslora"])
def test_one_adapter(common, combination):
    model = adapted(**common)
    model.add_weighted_adapter(adapters=["two"], weights=[-0.6], adapter_name="new", combination_type=combination)
    assert_right(model, names=["two"], weights=[-0.6])


def lora_layers(model):
    return [getattr(model.base_model.model, layer) for layer in LAYERS]


@pytest.mark.parametrize("combination", ["svd", "cat", "linear"])
def test_saved_and_loaded_it_is_the_same(tmp_path, combination):
    model = adapted(ranks=dict.fromkeys(NAMES, 4), **RS)
    model.add_weighted_adapter(NAMES, WEIGHTS, "new", combination_type=combination, svd_rank=12)
    model.save_pretrained(tmp_path, selected_adapters=["new"])
    torch.manual_seed(0)
    loaded = peft.PeftModel.from_pretrained(Net(), tmp_path / "new", "new")
    expected = merged_weights(model, "new")
    for layer, update in merged_weights(loaded, "new").items():
        assert (update - expected[layer]).norm() <= 1e-6 * expected[layer].norm()


def test_its_scale_can_be_set():
    model = adapted(**RS)
    model.add_weighted_adapter(NAMES, WEIGHTS, "new", svd_rank=10)
    for layer in lora_layers(model):
        layer.set_scale("new", 0.5)
    assert_right(model, weights=[weight / 2 for weight in WEIGHTS])


REFUSED = {
    "use_dora": True,
    "lora_bias": True,
    "trainable_token_indices": {"table": [1, 2]},
    "init_lora_weights": "pissa",
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("place", ["one", "two"])
@pytest.mark.parametrize("combination", ["svd", "linear", "cat", "ties_svd"])
@pytest.mark.parametrize("setting", REFUSED)
def test_adapters_that_are_more_than_factors_are_refused(setting, combination, place):
    names = ["one", "two"]
    own = {place: {setting: REFUSED[setting]}}
    model = adapted(own, names, dict.fromkeys(names, 4), target_modules=["first"])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(AdapterRefusedError, match=f"adapter {place}: {setting} is"):
        model.add_weighted_adapter(names, [1.0, 1.0], "new", combination_type=combination, density=0.5)
    after = model.state_dict()
    assert "new" not in model.peft_config and before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.parametrize("owner", ["one", "two"])
def test_modules_that_one_adapter_saves_are_those_of_the_result(tmp_path, owner):
    names = ["one", "two"]
    model = adapted({owner: {"modules_to_save": ["second"]}}, names, target_modules=["first"])
    trained = model.base_model.model.second.modules_to_save[owner]
    torch.nn.init.normal_(trained.weight)
    model.add_weighted_adapter(names, [0.5, 1.5], "new", svd_rank=6)
    assert not any(p.requires_grad for p in model.base_model.model.second.modules_to_save["new"].parameters())
    model.set_adapter("new")
    model.save_pretrained(tmp_path, selected_adapters=["new"])
    torch.manual_seed(0)
    for found in (model, peft.PeftModel.from_pretrained(Net(), tmp_path / "new", "new")):
        merged = copy.deepcopy(found).merge_and_unload()
        assert torch.equal(merged.second.weight, trained.weight)
        update = merged.first.weight.double() - model.base_model.model.first.get_base_layer().weight
        exact = truth(model, "first", names, [0.5, 1.5])
        assert (update - exact).norm() <= 1e-5 * exact.norm()


def test_one_module_that_two_adapters_save_is_refused_by_peft():
    model = adapted(names=["one", "two"], target_modules=["first"], modules_to_save=["second"])
    with pytest.raises(ValueError, match="same module with modules_to_save"):
        model.add_weighted_adapter(["one", "two"], [0.5, 1.5], "new", svd_rank=6)


def test_another_number_of_weights_is_refused():
    model = adapted()
    with pytest.raises(ConfigError, match="3 adapters but 2 weights"):
        model.add_weighted_adapter(NAMES, [1.0, 1.0], "new", combination_type="svd")
    assert "new" not in model.peft_config


def test_an_adapter_that_is_there_stays():
    model = adapted(**RS)
    scalings = [layer.scaling["one"] for layer in lora_layers(model)]
    model.add_weighted_adapter(NAMES, WEIGHTS, "one", combination_type="svd")
    assert [layer.scaling["one"] for layer in lora_layers(model)] == scalings
    with pytest.raises(ValueError, match="does not exist"):
        model.add_weighted_adapter(["one", "four"], [1.0, 1.0], "new")
