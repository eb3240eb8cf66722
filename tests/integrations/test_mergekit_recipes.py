"""The same recipe in mergekit without our backend and in our runner: the same update, for every place of the base."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from r_tsvm_kernels.cli import main
from r_tsvm_kernels.integrations import mergekit as integration

pytest.importorskip("mergekit", reason="mergekit is not installed: run make test-integrations")
pytestmark = pytest.mark.filterwarnings("ignore")  # of mergekit and transformers

GRADIENT = [{"filter": "mlp", "value": [0.2, 0.9, 0.4]}, {"value": 0.7}]
# Shares are those of whole numbers of elements, and no share is pruned at random.
METHODS = {
    "linear": {"weight": GRADIENT},
    "linear-sum": {"weight": GRADIENT, "normalize": False},
    "karcher": {"max_iter": 30, "tol": 1e-7},
    "task_arithmetic": {"weight": GRADIENT, "lambda": 0.8},
    "task_arithmetic-mean": {"weight": GRADIENT, "normalize": True},
    "ties": {"weight": GRADIENT, "density": 0.25, "int8_mask": True},
    "ties-sum": {"weight": GRADIENT, "density": [0.25, 0.5, 0.75], "normalize": False},
    "ties-rescaled": {"weight": GRADIENT, "density": 0.25, "rescale": True},
    "breadcrumbs": {"weight": GRADIENT, "density": 0.25, "gamma": 0.125},
    "breadcrumbs_ties": {"weight": GRADIENT, "density": 0.25, "gamma": 0.125, "normalize": True},
    "dare_linear": {"weight": GRADIENT},
    "dare_ties": {"weight": GRADIENT},
    "della": {"weight": GRADIENT},
    "della_linear": {"weight": GRADIENT},
    "sce": {"select_topk": 0.5},
    "model_stock": {},
    "model_stock-rows": {"filter_wise": True},
    "multislerp": {"weight": GRADIENT},
    "multislerp-sum": {"weight": GRADIENT, "normalize_weights": False},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    transformers = pytest.importorskip("transformers", reason="mergekit needs it")
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "base")
    base = load_file(folder / "base" / "model.safetensors")
    shared = {name: torch.randn_like(tensor) for name, tensor in base.items()}
    for name in "abc":
        shutil.copytree(folder / "base", folder / name)
        tuned = {key: t + 0.05 * torch.randn_like(t) + 0.05 * shared[key] for key, t in base.items()}
        save_file(tuned, folder / name / "model.safetensors", metadata={"format": "pt"})
    return folder


def weights(folder):
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def by_mergekit(recipe, out):
    """Run mergekit on its own arithmetic."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    integration.uninstall()
    options = MergeOptions(cuda=False, copy_tokenizer=False, quiet=True, write_model_card=False)
    run_merge(MergeConfiguration.model_validate(recipe), str(out), options)
    return weights(out)


def by_us(recipe, out):
    file = out.with_suffix(".yml")
    file.write_text(json.dumps(recipe))  # JSON is YAML
    assert main(["merge", str(file), str(out), "--device=cpu", "--quiet"]) == 0
    return weights(out)


def assert_same_updates(recipe, models, tmp_path):
    base = weights(models / "base")
    theirs, ours = by_mergekit(recipe, tmp_path / "theirs"), by_us(recipe, tmp_path / "ours")
    assert theirs.keys() == ours.keys()
    for name, tensor in ours.items():
        update = theirs[name] - base[name]
        assert (tensor - theirs[name]).norm() <= 1e-5 * max(update.norm(), 1e-2), name
        assert update.norm() > 0


def entry(models, name, **parameters):
    return {"model": str(models / name), **({"parameters": parameters} if parameters else {})}


@pytest.mark.parametrize("place", ["not listed", "first", "last"])
@pytest.mark.parametrize("case", METHODS)
def test_models(models, tmp_path, case, place):
    parameters = METHODS[case]
    own = {"weight": 0.3} if "weight" in parameters else {}  # b alone has a weight of its own
    listed = [entry(models, "a"), entry(models, "b", **own), entry(models, "c")]
    if place != "not listed":
        listed.insert(0 if place == "first" else 3, entry(models, "base", **({"weight": 0.6} if own else {})))
    recipe = {"merge_method": case.split("-")[0], "base_model": str(models / "base"), "models": listed}
    assert_same_updates({**recipe, "parameters": parameters, "dtype": "float32"}, models, tmp_path)


@pytest.mark.parametrize("base_model", ["base", None])
@pytest.mark.parametrize("case", ["linear", "linear-sum", "karcher"])
def test_a_slice_has_all_its_models_listed(models, tmp_path, case, base_model):
    sources = [{**entry(models, name), "layer_range": [0, 3]} for name in "abc"]
    recipe = {"merge_method": case.split("-")[0], "slices": [{"sources": sources}], "dtype": "float32"}
    if base_model:
        recipe["base_model"] = str(models / base_model)
    assert_same_updates({**recipe, "parameters": METHODS[case]}, models, tmp_path)


@pytest.mark.parametrize("place", ["not listed", "first", "last"])
@pytest.mark.parametrize("t", [0.0, 0.3, [0.2, 0.9, 0.4], 1.0])
def test_slerp(models, tmp_path, t, place):
    listed = [entry(models, "a")]
    if place != "not listed":
        listed.insert(0 if place == "first" else 1, entry(models, "base"))
    recipe = {"merge_method": "slerp", "base_model": str(models / "base"), "models": listed, "dtype": "float32"}
    if t == 0.0:
        ours = by_us({**recipe, "parameters": {"t": t}}, tmp_path / "ours")
        assert all(torch.equal(ours[name], tensor) for name, tensor in weights(models / "base").items())
    else:
        assert_same_updates({**recipe, "parameters": {"t": t}}, models, tmp_path)


def test_without_a_weight_for_the_base_both_refuse(models, tmp_path, capsys):
    listed = [entry(models, name, weight=0.5) for name in "ab"]
    recipe = {"merge_method": "linear", "base_model": str(models / "base"), "models": listed, "dtype": "float32"}
    with pytest.raises(RuntimeError, match="Missing required parameter weight"):
        by_mergekit(recipe, tmp_path / "theirs")
    (tmp_path / "r.yml").write_text(json.dumps(recipe))
    assert main(["merge", str(tmp_path / "r.yml"), str(tmp_path / "ours")]) == 2
    assert "linear merges the base, too" in capsys.readouterr().err
