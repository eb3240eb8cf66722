"""Adapters combined as PEFT does. PEFT is not a dependency: `make test-integrations` runs all of this."""

import copy
import importlib.util
import json

import pytest
import torch
from adapters import dense_updates, factors, random_adapter, save_adapter
from compare import relative_error
from safetensors.torch import load_file
from torch import nn

from r_tsvm_kernels.errors import (
    AdapterRefusedError,
    CheckpointError,
    ConfigError,
    IntegrationError,
    NonFiniteError,
    ShapeError,
)
from r_tsvm_kernels.integrations import peft as integration
from r_tsvm_kernels.integrations.peft import combine_adapters
from r_tsvm_kernels.lora_tools import merge_lora
from r_tsvm_kernels.ops import random_mask

ABSENT = importlib.util.find_spec("peft") is None
needs_peft = pytest.mark.skipif(ABSENT, reason="peft is not installed: run make test-integrations")

WEIGHTS = ([0.7, -0.4, 1.1], [1.0, 1.0, 1.0])
PRUNING = ("magnitude_prune_svd", "ties_svd", "dare_linear_svd", "dare_ties_svd")
SEED = 11


def merged_densely(updates, weights, kind, density, majority="total", masks=None):
    """PEFT's formulas in float64, element by element."""
    updates = [update.double() for update in updates]
    if "dare" in kind:
        updates = [update * mask / density for update, mask in zip(updates, masks, strict=True)]
    elif kind != "svd":
        count = int(density * updates[0].numel())
        updates = [update * (update.abs() >= update.abs().flatten().sort().values[-count]) for update in updates]
    if "ties" not in kind:
        return sum(weight * update for weight, update in zip(weights, updates, strict=True))
    votes = sum(update if majority == "total" else update.sign() for update in updates)
    agree = [update * votes > 0 if majority == "total" else update.sign() * votes.sign() > 0 for update in updates]
    agree = [torch.where(votes == 0, update > 0, same) for update, same in zip(updates, agree, strict=True)]
    total = sum(w * update * same for w, update, same in zip(weights, updates, agree, strict=True))
    return total / sum(same.double() for same in agree).clamp(min=1)


def cut(matrix, rank):
    U, values, Vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return U[:, :rank] * values[:rank] @ Vh[:rank]


# --- state dicts, without PEFT -----------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path):
    """Adapters of ranks 3, 2 and 4; the last one lacks a module."""
    shapes = {"layers.0.q": (24, 16), "layers.0.up": (40, 16), "token_embed": (12, 30)}
    folders = [
        random_adapter(tmp_path / f"a{task}", task, rank, shapes=shapes, lora_alpha=alpha)
        for task, (rank, alpha) in enumerate([(3, 6), (2, 5)])
    ]
    del shapes["layers.0.up"]
    return [*folders, random_adapter(tmp_path / "a2", 2, 4, shapes=shapes, use_rslora=True)]


def opened(folders):
    tensors = [load_file(folder / "adapter_model.safetensors") for folder in folders]
    return tensors, [json.loads((folder / "adapter_config.json").read_text()) for folder in folders]


def updates_of(tmp_path, state_dict, config):
    """The updates as read by a program that knows the files alone."""
    from safetensors.torch import save_file

    folder = tmp_path / "combined"
    folder.mkdir()
    save_file(state_dict, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return dense_updates(folder)


@pytest.mark.parametrize("weights", WEIGHTS, ids=["unequal", "equal"])
@pytest.mark.parametrize("majority", ["total", "frequency"])
@pytest.mark.parametrize("kind", ["svd", *PRUNING])
def test_the_combined_update_is_that_of_the_formula(tmp_path, folders, kind, weights, majority):
    state_dict, config = combine_adapters(
        *opened(folders), weights, kind, rank=5, density=None if kind == "svd" else 0.6,
        majority_sign_method=majority, seed=SEED,
    )  # fmt: skip
    found = updates_of(tmp_path, state_dict, config)
    inputs = [dense_updates(folder) for folder in folders]
    assert list(found) == list(inputs[0]) and config["r"] == config["lora_alpha"] == 5
    for position, module in enumerate(inputs[0]):
        own = [(update[module], weight) for update, weight in zip(inputs, weights, strict=True) if module in update]
        shape = own[0][0].shape
        masks = [random_mask(shape, 0.6, seed=SEED + position, substream=task) for task in range(len(own))]
        updates, shares = zip(*own, strict=True)
        expected = cut(merged_densely(updates, shares, kind, 0.6, majority, masks), 5)
        assert relative_error(found[module], expected) < 2e-6


@pytest.mark.parametrize("kind", PRUNING)
def test_larger_layers_need_no_full_decomposition(tmp_path, monkeypatch, kind):
    monkeypatch.delattr("r_tsvm_kernels.integrations.peft.updates.truncated_svd")
    folders = [random_adapter(tmp_path / str(task), task, 2, shapes={"q": (200, 240)}) for task in range(2)]
    state_dict, config = combine_adapters(*opened(folders), [1.0, 0.7], kind, rank=3, density=0.6, seed=SEED)
    masks = [random_mask((200, 240), 0.6, seed=SEED, substream=task) for task in range(2)]
    updates = [dense_updates(folder)["q"] for folder in folders]
    expected = cut(merged_densely(updates, [1.0, 0.7], kind, 0.6, masks=masks), 3)
    assert relative_error(updates_of(tmp_path, state_dict, config)["q"], expected) < 1e-5


def test_linear_combines_the_factors_as_peft_does(tmp_path):
    folders = [random_adapter(tmp_path / str(task), task, 3, lora_alpha=5) for task in range(2)]
    tensors, configs = opened(folders)
    found = updates_of(tmp_path, *combine_adapters(tensors, configs, [0.5, -2.0], "linear"))
    roots = [(0.5 * 5 / 3) ** 0.5, (2.0 * 5 / 3) ** 0.5]
    for module, update in found.items():
        A, B = ([t[f"base_model.model.{module}.lora_{x}.weight"].double() for t in tensors] for x in "AB")
        expected = (roots[0] * B[0] + roots[1] * B[1]) @ (roots[0] * A[0] - roots[1] * A[1])
        assert relative_error(update, expected) < 1e-6


def test_tsvm_is_that_of_merge_lora(tmp_path, folders):
    found = updates_of(tmp_path, *combine_adapters(*opened(folders), [1.0, 0.5, 2.0], "tsvm", rank=4))
    merge_lora([str(f) for f in folders], tmp_path / "out", weight=[1.0, 0.5, 2.0], rank=4)
    for module, expected in dense_updates(tmp_path / "out").items():
        assert relative_error(found[module], expected) < 1e-6


def test_ranks_and_dtypes_follow_the_inputs_unless_given(tmp_path, folders):
    tensors, configs = opened(folders)
    tensors[1] = {name: tensor.bfloat16() for name, tensor in tensors[1].items()}
    tensors[0] = {name: tensor.half() for name, tensor in tensors[0].items()}
    state_dict, config = combine_adapters(tensors[:2], configs[:2])
    assert config["r"] == 3 and {t.dtype for t in state_dict.values()} == {torch.float32}
    state_dict, config = combine_adapters(tensors[:1], configs[:1], dtype=torch.bfloat16, rank=2)
    assert config["r"] == 2 and {t.dtype for t in state_dict.values()} == {torch.bfloat16}
    exact = combine_adapters(tensors, configs, combination_type="tsvm")[1]
    assert {**exact["rank_pattern"]} == {"layers.0.q": 9, "layers.0.up": 5, "token_embed": 9}


def test_masks_follow_the_seed(folders):
    def combined(seed):
        return combine_adapters(*opened(folders), None, "dare_linear_svd", density=0.5, seed=seed)[0]

    first, again, other = combined(0), combined(0), combined(1)
    assert all(torch.equal(first[name], again[name]) and not torch.equal(first[name], other[name]) for name in first)


def test_base_layers_are_carried_over_and_compared(tmp_path):
    modules = {"q": factors((8, 6), 2, 0), "token_embed": factors((6, 30), 2, 1)}
    weight = {"base_model.model.token_embed.base_layer.weight": torch.randn(30, 6)}
    folders = [save_adapter(tmp_path / name, modules, weight) for name in "ab"]
    tensors, configs = opened(folders)
    state_dict, _ = combine_adapters(tensors, configs)
    assert torch.equal(state_dict[next(iter(weight))], next(iter(weight.values())))
    tensors[1] = {name: t + 1 if "base_layer" in name else t for name, t in tensors[1].items()}
    with pytest.raises(
        CheckpointError, match=r"adapters\[1\]: its base weight of .* differs from that of adapters\[0\]"
    ):
        combine_adapters(tensors, configs)


def test_mistakes_are_refused_by_name(folders):
    tensors, configs = opened(folders)

    def refused(error, match, *args, **kwargs):
        with pytest.raises(error, match=match):
            combine_adapters(*args, **kwargs)

    refused(ConfigError, "one config and one weight per adapter", tensors, configs[:2])
    refused(ConfigError, "one config and one weight per adapter", [], [])
    refused(ConfigError, "finite", tensors, configs, [1.0, float("nan"), 1.0])
    refused(ConfigError, "combination_type must be one of svd, .*got 'cat'", tensors, configs, combination_type="cat")
    refused(ConfigError, "rank must be at least 1", tensors, configs, rank=0)
    refused(ConfigError, "ties_svd needs a density", tensors, configs, combination_type="ties_svd")
    refused(ConfigError, "density .*got 0", tensors, configs, combination_type="dare_linear_svd", density=0)
    refused(ConfigError, "total or frequency", tensors, configs, majority_sign_method="most")
    refused(ConfigError, r"one rank, got ranks \[2, 3, 4\]", tensors, configs, combination_type="linear")
    refused(CheckpointError, "nothing is left", tensors, configs, [0.0] * 3)
    refused(CheckpointError, "hold no tensors", [{}], configs[:1])
    refused(AdapterRefusedError, r"adapters\[1\]: use_dora", tensors[:2], [configs[0], configs[1] | {"use_dora": True}])
    refused(AdapterRefusedError, "not a factor of a LoRA", [{"q.lora_A.default.weight": torch.ones(2, 2)}], configs[:1])
    name = next(iter(tensors[0]))
    refused(NonFiniteError, r"adapters\[0\]", [tensors[0] | {name: tensors[0][name] / 0}, tensors[1]], configs[:2])
    wider = {name: torch.cat([t, t], 1) if "lora_A" in name else t for name, t in tensors[1].items()}
    refused(ShapeError, "one base", [tensors[0], wider], configs[:2])


# --- under add_weighted_adapter ----------------------------------------------------------------------------------

LAYERS = {"linear": nn.Linear(20, 28), "embedding": nn.Embedding(30, 16), "conv": nn.Conv2d(6, 10, 3),
          "conv1x1": nn.Conv2d(12, 20, 1)}  # fmt: skip


@pytest.fixture
def install():
    yield integration.install
    integration.uninstall()


def adapted(layer, dtype=torch.float32, **config):
    """A model of one layer with three adapters of ranks 4, 2 and 4, and other scalings."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = nn.Module()
    model.layer = copy.deepcopy(layer)
    settings = {"target_modules": ["layer"], "init_lora_weights": False, **config}
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=6, **settings), "one")
    model.add_adapter("two", LoraConfig(r=2, lora_alpha=9, **settings))
    model.add_adapter("three", LoraConfig(r=4, lora_alpha=4, **settings))
    return model.to(dtype)


def combined(model, kind, weights=WEIGHTS[0], seed=3, **options):
    torch.manual_seed(seed)
    options = {"density": 0.5, "svd_rank": 5} | options
    model.add_weighted_adapter(["one", "two", "three"], weights, "new", combination_type=kind, **options)
    layer = model.base_model.model.layer
    update = layer.get_delta_weight("new").detach().double()
    factors = [parameter for name, parameter in layer.named_parameters() if "new" in name]
    model.delete_adapter("new")
    return update, factors


def counted(kind):
    return integration.calls().get(kind, 0)


@needs_peft
@pytest.mark.parametrize("weights", WEIGHTS, ids=["unequal", "equal"])
@pytest.mark.parametrize("kind", ["svd", "magnitude_prune_svd", "ties_svd"])
@pytest.mark.parametrize("name", LAYERS)
def test_the_update_is_pefts_in_float64(install, name, kind, weights):
    exact, _ = combined(adapted(LAYERS[name], torch.float64), kind, weights, majority_sign_method="frequency")
    model = adapted(LAYERS[name])
    theirs, shapes = combined(model, kind, weights, majority_sign_method="frequency")
    install()
    before = counted(kind)
    ours, factors = combined(model, kind, weights, majority_sign_method="frequency")
    assert counted(kind) == before + 1
    assert [(f.shape, f.dtype) for f in factors] == [(f.shape, f.dtype) for f in shapes]
    assert relative_error(ours, exact) <= max(2 * relative_error(theirs, exact), 1e-6)


@needs_peft
@pytest.mark.parametrize("weights", WEIGHTS, ids=["unequal", "equal"])
@pytest.mark.parametrize("kind", ["dare_linear_svd", "dare_ties_svd"])
def test_random_pruning_is_pefts_with_our_masks(install, monkeypatch, kind, weights):
    seeds = []

    def draw_like_us(probabilities=None, *, input=None):
        stream = len(seeds) % 3
        seeds.append(seeds[-1] if stream else int(torch.randint(2**63 - 1, ())))
        share = float(probabilities.flatten()[0])
        return random_mask(probabilities.shape, share, seed=seeds[-1], substream=stream).to(probabilities)

    model = adapted(LAYERS["linear"])
    with monkeypatch.context() as patch:
        patch.setattr(torch, "bernoulli", draw_like_us)
        expected, _ = combined(model, kind, weights, density=0.6)
    install()
    ours, _ = combined(model, kind, weights, density=0.6)
    assert len(seeds) == 3 and relative_error(ours, expected) < 1e-5
    assert not torch.equal(ours, combined(model, kind, weights, density=0.6, seed=4)[0])


@needs_peft
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["svd", "ties_svd"])
def test_half_precision_is_not_rounded(install, kind, dtype):
    model = adapted(LAYERS["linear"], dtype)
    exact, _ = combined(model.double(), kind)
    model.to(dtype)
    theirs, theirs_factors = combined(model, kind)
    install()
    ours, factors = combined(model, kind)
    assert [f.dtype for f in factors] == [f.dtype for f in theirs_factors] == [torch.float32] * 2
    assert relative_error(ours, exact) < min(1e-6, relative_error(theirs, exact))


@needs_peft
def test_transposed_weights(install):
    from transformers.pytorch_utils import Conv1D

    model = adapted(Conv1D(28, 20), fan_in_fan_out=True)
    expected, _ = combined(model, "ties_svd")
    install()
    assert relative_error(combined(model, "ties_svd")[0], expected) < 1e-5


@needs_peft
def test_a_density_of_one_prunes_nothing_and_warns(install):
    install()
    model = adapted(LAYERS["linear"])
    expected, _ = combined(model, "svd")
    for kind in ("magnitude_prune_svd", "dare_linear_svd"):
        with pytest.warns(UserWarning, match="density is 1.0: nothing is pruned"):
            assert torch.equal(combined(model, kind, density=1.0)[0], expected)


@needs_peft
def test_a_rank_beyond_the_numerical_rank_leaves_zeros(install):
    install()
    model = adapted(LAYERS["linear"])
    expected = sum(
        weight * model.base_model.model.layer.get_delta_weight(name).detach().double()
        for name, weight in zip(["one", "two", "three"], WEIGHTS[0], strict=True)
    )
    update, (A, B) = combined(model, "svd", svd_rank=18)
    assert A.shape == (18, 20) and B.shape == (28, 18) and not A[10:].any() and not B[:, 10:].any()
    assert relative_error(update, expected) < 1e-6


@needs_peft
@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
@pytest.mark.parametrize(
    ("layer", "options"),
    [(nn.Linear(20, 28), {"svd_clamp": 0.9}), (nn.Linear(20, 28), {"combination_type": "linear"}),
     (nn.Linear(20, 28), {"density": 0.0, "kind": "dare_linear_svd", "error": True}),
     (nn.Linear(20, 28), {"density": None, "kind": "ties_svd", "error": True}),
     (nn.Linear(20, 28), {"majority_sign_method": "most", "kind": "ties_svd", "error": True}),
     (nn.Conv2d(8, 12, 3, groups=2), {"svd_rank": 4, "error": True})],
    ids=["clamped", "other type", "no density", "density missing", "unknown election", "groups"],
)  # fmt: skip
def test_what_is_left_to_peft_stays_pefts(install, layer, options):
    options = dict(options)
    kind, error = options.pop("kind", "svd"), options.pop("error", False)
    if options.pop("combination_type", None):
        kind = "cat"
    model = adapted(layer)

    def outcome():
        try:
            return combined(model, kind, **options)[0]
        except Exception as failure:
            model.delete_adapter("new")
            return type(failure), str(failure)

    expected = outcome()
    install()
    before = counted("left to PEFT")
    found = outcome()
    assert counted("left to PEFT") == before + (kind != "cat")
    assert torch.equal(found, expected) if isinstance(expected, torch.Tensor) else found == expected
    assert not isinstance(expected, torch.Tensor) or not error


@needs_peft
def test_install_can_be_repeated_and_undone(monkeypatch):
    from peft import LoraModel

    from r_tsvm_kernels.integrations.peft.patch import METHOD

    original = getattr(LoraModel, METHOD)
    for _ in range(2):
        integration.install()
        assert getattr(LoraModel, METHOD) is not original
    integration.uninstall()
    integration.uninstall()
    assert getattr(LoraModel, METHOD) is original
    monkeypatch.delattr(LoraModel, METHOD)
    with pytest.raises(IntegrationError, match=r"not built as expected .*weighted_adapter.*tested: 0\.21\.2"):
        integration.install()


@needs_peft
@pytest.mark.parametrize("kind", ["svd", "linear", "ties_svd"])
def test_state_dicts_and_models_give_the_same_update(kind):
    from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict

    model = adapted(LAYERS["linear"], use_rslora=True)
    names = ["one", "three"]
    options = {"density": 0.5} if kind == "ties_svd" else {}
    state_dict, config = combine_adapters(
        [get_peft_model_state_dict(model, adapter_name=name) for name in names],
        [model.peft_config[name].to_dict() for name in names],
        [0.5, -1.5], kind, **options,
    )  # fmt: skip
    model.add_weighted_adapter(names, [0.5, -1.5], "theirs", combination_type=kind, **options)
    model.add_adapter("ours", LoraConfig(**json.loads(json.dumps(config))))
    outcome = set_peft_model_state_dict(model, state_dict, "ours")
    assert not outcome.unexpected_keys
    layer = model.base_model.model.layer
    ours, theirs = (layer.get_delta_weight(name).detach() / layer.scaling[name] for name in ("ours", "theirs"))
    assert layer.scaling["ours"] == 1
    assert relative_error(ours, theirs) < 1e-5
