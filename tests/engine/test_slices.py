"""Merges of slices and modules, against the tensors that they are made of."""

import json

import pytest
import torch
from adapters import dense_updates, random_adapter
from checkpoints import save
from safetensors.torch import load_file

from r_tsvm_kernels import (
    CheckpointError,
    ConfigError,
    MemoryBudgetError,
    MergeConfig,
    ResumeRefusedError,
    ShapeError,
    merge_checkpoints,
    merge_tensors,
    verify_output,
)
from r_tsvm_kernels.plan import make_plan

PARTS = {"self_attn.q_proj.weight": (8, 8), "mlp.up_proj.weight": (12, 8), "input_layernorm.weight": (8,)}
PREFIX = "model.layers."
CONFIG = {
    "model_type": "llama", "hidden_size": 8, "num_hidden_layers": 4, "eos_token_id": [1, 2, 3, 4],
    "layer_types": ["full", "sliding", "full", "sliding"], "mlp_only_layers": [0, 3], "torch_dtype": "float32",
}  # fmt: skip


def model(seed, layers=4, rows=20, tied=False, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    found = {"model.embed_tokens.weight": draw(rows, 8), "model.norm.weight": draw(8)}
    found |= {} if tied else {"lm_head.weight": draw(rows, 8)}
    for layer in range(layers):
        found |= {f"{PREFIX}{layer}.{part}": draw(*shape) for part, shape in PARTS.items()}
    return found


@pytest.fixture
def models(tmp_path):
    """Folders of three models in one, two and three shards, and their tensors."""
    tensors = {name: model(seed) for seed, name in enumerate("abc")}
    paths = {name: str(save(tmp_path / name, own, 1 + i, CONFIG)) for i, (name, own) in enumerate(tensors.items())}
    return paths, tensors


def source(path, first, last, **parameters):
    return {"model": path, "layer_range": [first, last], **({"parameters": parameters} if parameters else {})}


def config_of(method, slices, **fields):
    return MergeConfig.from_dict({"merge_method": method, "slices": slices, **fields})


def merged(config, out, **options):
    result = merge_checkpoints(config, out, **options)
    assert verify_output(out, inputs=True).ok
    found = {k: v for file in sorted(result.path.glob("*.safetensors")) for k, v in load_file(file).items()}
    return found, json.loads((result.path / "config.json").read_text())


def expected(layers, before, after):
    """A model of these layers, each a model's tensors and an index, with the tensors outside them of two models."""
    found = {f"{PREFIX}{i}.{part}": own[f"{PREFIX}{k}.{part}"] for i, (own, k) in enumerate(layers) for part in PARTS}
    outside = {"model.embed_tokens.weight": before, "model.norm.weight": after, "lm_head.weight": after}
    return found | {name: own[name] for name, own in outside.items()}


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), name


@pytest.mark.parametrize("shard_size", ["5GB", 900])
def test_a_model_of_the_layers_of_others(models, tmp_path, shard_size):
    paths, t = models
    spans = [("a", 0, 3), ("b", 1, 4), ("a", 2, 3), ("c", 3, 4)]
    slices = [{"sources": [source(paths[name], first, last)]} for name, first, last in spans]
    got, config = merged(config_of("passthrough", slices), tmp_path / "out", shard_size=shard_size)
    layers = [(t[name], k) for name, first, last in spans for k in range(first, last)]
    assert_same(got, expected(layers, t["a"], t["c"]))
    assert (config["num_hidden_layers"], config["mlp_only_layers"]) == (8, [0, 5, 7])
    assert config["layer_types"] == ["full", "sliding", "full", "sliding", "full", "sliding", "full", "sliding"]
    assert config["eos_token_id"] == [1, 2, 3, 4]
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert report["models"] == [paths[name] for name in "abc"]
    again = MergeConfig.from_yaml(tmp_path / "out" / "merge_recipe.yaml")
    assert_same(merged(again, tmp_path / "again")[0], got)


def test_slices_have_their_own_parameters_models_and_gradients(models, tmp_path):
    paths, t = models
    slices = [
        {"sources": [source(paths["a"], 0, 1)]},
        {"sources": [source(paths["a"], 1, 4), source(paths["b"], 0, 3, weight=[0.1, 0.5])]},
        {
            "sources": [source(paths["a"], 0, 1), source(paths["b"], 2, 3), source(paths["c"], 3, 4)],
            "parameters": {"weight": [{"filter": "mlp", "value": 0.3}]},
        },
    ]
    config = config_of("task_arithmetic", slices, base_model=paths["a"], parameters={"weight": 0.7})
    got, _ = merged(config, tmp_path / "out")

    def of(layer, part, base, *others):
        """One tensor, from models with their layers and weights."""
        (own, k), name = base, f"{PREFIX}{layer}.{part}"
        tuned = [other[f"{PREFIX}{j}.{part}"] for other, j, _ in others]
        weight = [w for *_, w in others]
        want = merge_tensors(own[f"{PREFIX}{k}.{part}"], tuned, "task_arithmetic", weight=weight).weight
        assert torch.equal(got[name], want), name

    for part in PARTS:
        assert torch.equal(got[f"{PREFIX}0.{part}"], t["a"][f"{PREFIX}0.{part}"])
        for i, weight in enumerate([0.1, 0.3, 0.5]):
            of(1 + i, part, (t["a"], 1 + i), (t["b"], i, weight))
        weight = 0.3 if "mlp" in part else 0.7
        of(4, part, (t["a"], 0), (t["b"], 2, weight), (t["c"], 3, weight))
    head = "lm_head.weight"
    want = merge_tensors(t["a"][head], [t["b"][head], t["c"][head]], "task_arithmetic", weight=0.7).weight
    assert torch.equal(got[head], want)
    assert torch.equal(got["model.embed_tokens.weight"], t["a"]["model.embed_tokens.weight"])


def test_layers_of_one_model_are_merged_with_each_other(models, tmp_path):
    paths, t = models
    slices = [{"sources": [source(paths["a"], 0, 2), source(paths["a"], 2, 4)]}]
    got, config = merged(config_of("slerp", slices, base_model=paths["a"], parameters={"t": 0.25}), tmp_path / "out")
    assert config["num_hidden_layers"] == 2
    name = "mlp.up_proj.weight"
    want = merge_tensors(t["a"][f"{PREFIX}1.{name}"], [t["a"][f"{PREFIX}3.{name}"]], "slerp", t=0.25).weight
    assert torch.equal(got[f"{PREFIX}1.{name}"], want)


def test_scales(models, tmp_path):
    paths, t = models
    scale = [{"filter": "mlp", "value": 0.0}, {"value": [1.0, 0.5]}]
    slices = [{"sources": [source(paths["b"], 1, 3, scale=scale)]}]
    got, _ = merged(config_of("passthrough", slices), tmp_path / "out")
    assert not got[f"{PREFIX}1.mlp.up_proj.weight"].any()
    for layer, factor in ((0, 1.0), (1, 0.5)):
        name = f"{PREFIX}{layer}.self_attn.q_proj.weight"
        assert torch.equal(got[name], factor * t["b"][f"{PREFIX}{layer + 1}.self_attn.q_proj.weight"])


def test_one_slice_of_fewer_layers_than_the_models_have(models, tmp_path):
    paths, t = models
    sources = [source(paths[name], 0, 3) for name in "ab"]
    got, config = merged(config_of("linear", [{"sources": sources}]), tmp_path / "out")
    assert config["num_hidden_layers"] == 3 and f"{PREFIX}3.mlp.up_proj.weight" not in got
    name = f"{PREFIX}2.mlp.up_proj.weight"
    assert (got[name] - (t["a"][name] + t["b"][name]) / 2).abs().max() < 1e-6


def test_one_model_as_it_is(models, tmp_path):
    paths, t = models
    recipe = {"merge_method": "passthrough", "models": [{"model": paths["c"]}], "dtype": "bfloat16"}
    got, config = merged(MergeConfig.from_dict(recipe), tmp_path / "out")
    assert_same(got, {name: tensor.bfloat16() for name, tensor in t["c"].items()})
    assert config["torch_dtype"] == "bfloat16"
    with pytest.raises(ConfigError, match="passthrough takes 1 model for each tensor, got 2"):
        make_plan(MergeConfig.from_dict(recipe | {"models": [{"model": paths["c"]}, {"model": paths["a"]}]}), 10**9)


@pytest.mark.parametrize("threads", [1, 3])
def test_a_stopped_merge_resumes_to_the_same_bytes(models, tmp_path, threads):
    paths, _ = models
    two = [source(paths["a"], 0, 3), source(paths["b"], 1, 4)]
    slices = [{"sources": two}, {"sources": [source(paths["c"], 0, 4)]}]
    config = config_of("linear", slices)
    whole, _ = merged(config, tmp_path / "whole")

    def stop(state):
        if state.tensors_done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_checkpoints(config, tmp_path / "out", progress=stop, threads=threads)
    other = config_of("linear", [slices[1], slices[0]])
    with pytest.raises(ResumeRefusedError, match="recipe: slices"):
        merge_checkpoints(other, tmp_path / "out", resume=True)
    got, _ = merged(config, tmp_path / "out", resume=True)
    assert_same(got, whole)


def test_a_changed_input_is_found(models, tmp_path):
    paths, t = models
    slices = [{"sources": [source(paths["a"], 0, 1)]}, {"sources": [source(paths["a"], 3, 4)]}]
    merged(config_of("passthrough", slices), tmp_path / "out")
    name = f"{PREFIX}3.mlp.up_proj.weight"
    (tmp_path / "a" / "model.safetensors").unlink()
    (tmp_path / "a").rename(tmp_path / "old")
    save(tmp_path / "a", t["a"] | {name: t["a"][name] + 1}, config=CONFIG)
    found = verify_output(tmp_path / "out", inputs=True)
    assert found.inputs_changed == [f"{paths['a']}: {PREFIX}1.mlp.up_proj.weight"] and not found.changed


def test_a_memory_limit_holds_for_slices_too(models, tmp_path):
    paths, _ = models
    config = config_of("passthrough", [{"sources": [source(paths["a"], 0, 2)]}])
    with pytest.raises(MemoryBudgetError, match="at least"):
        merge_checkpoints(config, tmp_path / "out", memory="100MB")


@pytest.mark.parametrize(
    ("slices", "message"),
    [
        ([[("a", 0, 5)]], r"layers \[0, 5\] of .*/a, which has 4"),
        ([[("a", 4, 5)]], r"layers \[4, 5\] of .*/a, which has 4"),
        ([[("a", 0, 2), ("b", 0, 2)]], "passthrough takes 1 model for each tensor, got 2"),
    ],
)
def test_ranges_that_are_refused(models, slices, message):
    paths, _ = models
    slices = [{"sources": [source(paths[name], first, last) for name, first, last in own]} for own in slices]
    with pytest.raises(ConfigError, match=message):
        make_plan(config_of("passthrough", slices), 10**9)


def test_a_base_of_other_layers_has_to_be_listed(models):
    paths, _ = models
    slices = [{"sources": [source(paths["b"], 0, 2), source(paths["c"], 1, 3)]}]
    with pytest.raises(ConfigError, match=r"/a is the base of sources of other layers; list its layers, too"):
        make_plan(config_of("ties", slices, base_model=paths["a"]), 10**9)
    with pytest.raises(ConfigError, match="ties needs base_model"):
        make_plan(config_of("ties", slices), 10**9)


def test_models_of_other_sizes_are_refused(models, tmp_path):
    paths, t = models
    wide = {name: torch.cat([x, x]) if "up_proj" in name else x for name, x in t["b"].items()}
    other = save(tmp_path / "wide", wide, config=CONFIG)
    slices = [{"sources": [source(paths["a"], 0, 2)]}, {"sources": [source(str(other), 2, 4)]}]
    with pytest.raises(ShapeError, match=r"layers\.2\.mlp\.up_proj\.weight: has shape \(24, 8\) .* \(12, 8\) in .*/a"):
        make_plan(config_of("passthrough", slices), 10**9)
    taller = save(tmp_path / "taller", model(5, rows=22), config=CONFIG)
    with pytest.raises(ShapeError, match=r"lm_head\.weight: has shape \(22, 8\)"):
        make_plan(config_of("passthrough", [slices[0], {"sources": [source(str(taller), 2, 4)]}]), 10**9)


def test_models_of_other_depths(models, tmp_path):
    paths, t = models
    deep = model(7, layers=6)
    deeper = save(tmp_path / "deep", deep, config={**CONFIG, "num_hidden_layers": 6, "layer_types": ["x"] * 6})
    slices = [{"sources": [source(paths["a"], 0, 2)]}, {"sources": [source(str(deeper), 4, 6)]}]
    got, config = merged(config_of("passthrough", slices), tmp_path / "out")
    assert_same(got, expected([(t["a"], 0), (t["a"], 1), (deep, 4), (deep, 5)], t["a"], deep))
    assert config["layer_types"] == ["full", "sliding", "x", "x"] and config["num_hidden_layers"] == 4


def test_tied_embeddings(models, tmp_path):
    paths, _ = models
    tied = model(8, tied=True)
    other = str(save(tmp_path / "tied", tied, config={**CONFIG, "tie_word_embeddings": True}))
    halves = [{"sources": [source(other, 0, 2)]}, {"sources": [source(paths["a"], 2, 4)]}]
    # The configuration is that of the first model, and it ties a head that the second one trained apart.
    with pytest.raises(CheckpointError, match=r"/a: lm_head\.weight should be the same as model\.embed_tokens\.weight"):
        merge_checkpoints(config_of("passthrough", halves), tmp_path / "refused")
    halves = [{"sources": [source(paths["a"], 0, 2)]}, {"sources": [source(other, 2, 4)]}]
    got, _ = merged(config_of("passthrough", halves), tmp_path / "out")
    assert torch.equal(got["lm_head.weight"], tied["model.embed_tokens.weight"])
    both = [{"sources": [source(other, 0, 2)]}, {"sources": [source(other, 1, 4)]}]
    assert "lm_head.weight" not in merged(config_of("passthrough", both), tmp_path / "both")[0]


def test_settings_that_go_by_the_index_of_a_layer_are_noted(models, tmp_path):
    _, t = models
    other = str(save(tmp_path / "moe", t["a"], config={**CONFIG, "first_k_dense_replace": 1}))
    slices = [{"sources": [source(other, 0, 2)]}, {"sources": [source(other, 1, 4)]}]
    (note,) = [x for x in make_plan(config_of("passthrough", slices), 10**9).notes if "first_k_dense_replace 1" in x]
    assert "check that each kind stays" in note
    whole = [{"sources": [source(other, 0, 4)]}]
    assert not make_plan(config_of("passthrough", whole), 10**9).notes


def test_layers_behind_the_last_one_go_with_the_last_slice(tmp_path):
    config = {**CONFIG, "num_hidden_layers": 3, "num_nextn_predict_layers": 1, "layer_types": ["x"] * 3}
    own = model(0)
    path = str(save(tmp_path / "m", own, config=config))
    slices = [{"sources": [source(path, 0, 2)]}, {"sources": [source(path, 0, 3)]}]
    got, config = merged(config_of("passthrough", slices), tmp_path / "out")
    assert_same(got, expected([(own, k) for k in (0, 1, 0, 1, 2, 3)], own, own))
    assert (config["num_hidden_layers"], config["num_nextn_predict_layers"]) == (5, 1)


def test_adapters_in_slices(models, tmp_path):
    paths, t = models
    shapes = {f"{PREFIX}{k}.mlp.up_proj": (12, 8) for k in (0, 1, 3)}
    adapter = random_adapter(tmp_path / "lora", 3, rank=2, shapes=shapes)
    updates = dense_updates(adapter)
    name = f"{PREFIX}{{}}.mlp.up_proj.weight".format
    both = f"{paths['a']}+{adapter}"
    # Layers twice, and two sets of layers of one adapter in one slice.
    slices = [{"sources": [source(both, 0, 2)]}, {"sources": [source(both, 1, 4)]}]
    got, _ = merged(config_of("passthrough", slices), tmp_path / "copied")
    for layer, k in enumerate([0, 1, 1, 2, 3]):
        want = t["a"][name(k)].double() + updates.get(f"{PREFIX}{k}.mlp.up_proj", 0)
        assert (got[name(layer)] - want).abs().max() < 1e-6
        other = f"{PREFIX}{{}}.self_attn.q_proj.weight".format
        assert torch.equal(got[other(layer)], t["a"][other(k)])
    slices = [{"sources": [source(both, 0, 2), source(both, 2, 4), source(paths["b"], 0, 2)]}]
    got, _ = merged(config_of("task_arithmetic", slices, base_model=paths["b"]), tmp_path / "merged")
    for layer in (0, 1):
        tuned = [t["a"][name(k)].double() + updates.get(f"{PREFIX}{k}.mlp.up_proj", 0) for k in (layer, layer + 2)]
        want = sum(tuned) - t["b"][name(layer)].double()
        assert (got[name(layer)] - want).abs().max() < 2e-6
    slices = [{"sources": [source(str(adapter), 0, 2)]}]  # of the base
    got, _ = merged(config_of("task_arithmetic", slices, base_model=paths["a"]), tmp_path / "alone")
    assert (got[name(1)] - t["a"][name(1)] - updates[f"{PREFIX}1.mlp.up_proj"]).abs().max() < 1e-6


# --- modules


def multimodal(seed):
    own = model(seed)
    generator = torch.Generator().manual_seed(seed)
    vision = {f"vision_tower.layers.{i}.w.weight": torch.randn(6, 6, generator=generator) for i in range(2)}
    vision |= {"vision_tower.patch_embedding.weight": torch.randn(6, 3, generator=generator)}
    language = {f"language_model.{name}": tensor for name, tensor in own.items()}
    return language | vision | {"multi_modal_projector.linear_1.weight": torch.randn(8, 6, generator=generator)}


@pytest.fixture
def multimodals(tmp_path):
    config = {"model_type": "vlm", "text_config": CONFIG, "vision_config": {"num_hidden_layers": 2}}
    tensors = {name: multimodal(seed) for seed, name in enumerate("abc")}
    return {name: str(save(tmp_path / name, own, config=config)) for name, own in tensors.items()}, tensors


def test_modules_have_models_or_slices_of_their_own(multimodals, tmp_path):
    paths, t = multimodals
    halves = [{"sources": [source(paths["a"], 0, 2)]}, {"sources": [source(paths["b"], 1, 4)]}]
    modules = {
        "text_decoder": {"slices": halves},
        "vision_tower": {"models": [paths["c"]]},
    }
    recipe = {"merge_method": "passthrough", "base_model": paths["a"], "modules": modules}
    got, config = merged(MergeConfig.from_dict(recipe), tmp_path / "out")
    assert config["text_config"]["num_hidden_layers"] == 5 and config["vision_config"] == {"num_hidden_layers": 2}
    for name, tensor in got.items():
        if "vision" in name:
            assert torch.equal(tensor, t["c"][name])
    name = "multi_modal_projector.linear_1.weight"  # of no module of the recipe
    assert torch.equal(got[name], t["a"][name])
    part = "language_model.model.layers.{}.mlp.up_proj.weight".format
    assert torch.equal(got[part(4)], t["b"][part(3)]) and torch.equal(got[part(1)], t["a"][part(1)])
    assert torch.equal(got["language_model.lm_head.weight"], t["b"]["language_model.lm_head.weight"])


def test_parameters_of_modules(multimodals, tmp_path):
    paths, t = multimodals
    listed = [{"model": paths["b"]}, {"model": paths["c"], "parameters": {"weight": 0.1}}]
    modules = {
        "text_decoder": {"models": listed, "parameters": {"weight": [0.2, 0.8]}},
        "vision_tower": {"models": listed},
        "multi_modal_projector": {"models": listed[:1]},
    }
    recipe = {"merge_method": "task_arithmetic", "base_model": paths["a"], "modules": modules}
    got, _ = merged(MergeConfig.from_dict(recipe | {"parameters": {"weight": 0.5}}), tmp_path / "out")
    weights = {
        "language_model.model.layers.0.mlp.up_proj.weight": [0.2, 0.1],
        "language_model.model.layers.3.mlp.up_proj.weight": [0.8, 0.1],
        "vision_tower.layers.1.w.weight": [0.5, 0.1],
        "multi_modal_projector.linear_1.weight": [0.5],
    }
    assert got.keys() == t["a"].keys()
    for name, own in weights.items():
        tuned = [t[other][name] for other in "bc"[: len(own)]]
        assert torch.equal(got[name], merge_tensors(t["a"][name], tuned, "task_arithmetic", weight=own).weight), name


def test_modules_that_are_refused(multimodals):
    paths, _ = multimodals
    recipe = {"merge_method": "passthrough", "base_model": paths["a"]}
    listed = {"models": [{"model": paths["c"]}]}
    with pytest.raises(ConfigError, match="no tensor belongs to 'vison_tower'; did you mean 'vision_tower'"):
        make_plan(MergeConfig.from_dict(recipe | {"modules": {"text_decoder": listed, "vison_tower": listed}}), 10**9)
    shorter = {"slices": [{"sources": [source(paths["a"], 0, 1)]}]}
    with pytest.raises(ConfigError, match=r"vision_tower would have 1 layers, .* `rtsvm mergekit yaml RECIPE OUT`"):
        make_plan(MergeConfig.from_dict(recipe | {"modules": {"vision_tower": shorter}}), 10**9)


def test_slices_of_the_language_model_need_no_modules(multimodals, tmp_path):
    paths, t = multimodals
    halves = [{"sources": [source(paths["a"], 0, 2)]}, {"sources": [source(paths["b"], 2, 4)]}]
    got, _ = merged(config_of("passthrough", halves), tmp_path / "out")
    assert got.keys() == t["a"].keys()
    for name, tensor in got.items():
        if "vision_tower" in name:
            assert torch.equal(tensor, t["a"][name]), name


def test_the_same_bytes_with_any_number_of_threads(models, tmp_path):
    paths, _ = models
    slices = [{"sources": [source(paths["a"], 0, 3), source(paths["b"], 1, 4)]}]
    one, _ = merged(config_of("linear", slices), tmp_path / "one", threads=1)
    many, _ = merged(config_of("linear", slices), tmp_path / "many", threads=4)
    assert_same(one, many)
