"""mergekit's commands with our backend, and our own runner on the same recipes."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from r_tsvm_kernels.cli import main
from r_tsvm_kernels.integrations import mergekit as integration

pytest.importorskip("mergekit", reason="mergekit is not installed: run make test-integrations")
transformers = pytest.importorskip("transformers", reason="mergekit is not installed: run make test-integrations")
pytestmark = pytest.mark.filterwarnings("ignore")  # of mergekit and transformers

OPTIONS = ["--no-cuda", "--no-copy-tokenizer", "--quiet"]
WEIGHT = [{"filter": "mlp", "value": [0.2, 0.9, 0.4]}, {"value": 0.7}]  # of each layer its own
# Method: its parameters, and what is called once for each tensor. Random masks are not compared: within mergekit they
# follow its --random-seed, ours the name of the tensor. Shares are those of whole numbers of elements: of others ours
# keeps one element more.
RECIPES = {
    "linear": ({}, None),
    "task_arithmetic": ({"lambda": 0.8}, "elect_and_sum"),
    "ties": ({"density": 0.25, "lambda": 0.7}, "elect_and_sum"),
    "breadcrumbs": ({"density": 0.25, "gamma": 0.125}, "elect_and_sum"),
    "breadcrumbs_ties": ({"density": 0.25, "gamma": 0.125}, "elect_and_sum"),
    "sce": ({"select_topk": 1.0}, "sce"),
    "model_stock": ({}, "elect_and_sum"),
    "karcher": ({"max_iter": 7}, "elect_and_sum"),
    "multislerp": ({}, "elect_and_sum"),
    "slerp": ({"t": [{"filter": "mlp", "value": [0.2, 0.9, 0.4]}, {"value": 0.7}]}, "elect_and_sum"),
    "tsvm": ({"alpha": 0.9, "mode": "exact"}, "tsvm"),
    "rtsvm": ({"density": 0.5, "rank": "energy", "rank_energy": 0.9, "outlier_weighting": "damp"}, "rtsvm"),
    "iso_c": ({"alpha": 0.9}, "iso_c"),
    "iso_cts": ({"common_space_fraction": 0.5}, "iso_cts"),
    "star": ({"eta": 60.0}, "star"),
    "knots": ({"alpha": 0.9}, "knots"),
    "core_space": ({"alpha": 0.9}, "core_space"),
}
WITHOUT_WEIGHTS = {"sce", "model_stock", "karcher", "slerp"}
WITHOUT_BASE = {"linear", "karcher"}


def llama(seed, vocabulary=96):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    model = transformers.LlamaForCausalLM(config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model.bfloat16()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    for task, name in enumerate(["base", "a", "b", "c"]):
        llama(task).save_pretrained(folder / name)
    llama(1, vocabulary=100).save_pretrained(folder / "longer")
    return folder


def recipe(models, target, method, tuned="abc", dtype="bfloat16"):
    own = {} if method in WITHOUT_WEIGHTS else {"weight": WEIGHT}
    entries = [{"model": str(models / name), "parameters": own} for name in tuned]
    content = {"merge_method": method, "models": entries, "parameters": RECIPES[method][0], "dtype": dtype}
    if method not in WITHOUT_BASE:
        content["base_model"] = str(models / "base")
    target.write_text(json.dumps(content))  # JSON is YAML
    return str(target)


def weights(folder):
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("method", RECIPES)
def test_mergekit_yaml_and_our_runner_give_the_same_weights(models, tmp_path, method, dtype):
    file = recipe(models, tmp_path / "recipe.yml", method, tuned="a" if method == "slerp" else "abc", dtype=dtype)
    kernel, before = RECIPES[method][1], integration.calls()
    assert main(["mergekit", "yaml", file, str(tmp_path / "theirs"), *OPTIONS]) == 0
    after = integration.calls()
    assert main(["merge", file, str(tmp_path / "ours"), "--device=cpu", "--quiet"]) == 0
    theirs, ours = weights(tmp_path / "theirs"), weights(tmp_path / "ours")
    assert theirs.keys() == ours.keys()
    assert after.get(kernel, 0) == before.get(kernel, 0) + (len(ours) if kernel else 0)
    assert kernel or after == before
    for name, tensor in ours.items():
        precision = {"rtol": 2**-7, "atol": 1e-6} if dtype == "bfloat16" else {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(theirs[name], tensor, **precision)
        assert tensor.dtype == getattr(torch, dtype)


def test_a_slice_of_whole_models_is_the_same_for_both(models, tmp_path):
    t = [{"filter": "mlp", "value": [0.2, 0.9]}, {"filter": "norm", "value": [0, 1]}, {"value": 0.7}]
    content = {
        "merge_method": "slerp",
        "base_model": str(models / "base"),
        "slices": [{"sources": [{"model": str(models / name), "layer_range": [0, 3]} for name in ("base", "a")]}],
        "parameters": {"t": t},
        "dtype": "float32",
    }
    (tmp_path / "recipe.yml").write_text(json.dumps(content))
    assert main(["mergekit", "yaml", str(tmp_path / "recipe.yml"), str(tmp_path / "theirs"), *OPTIONS]) == 0
    assert main(["merge", str(tmp_path / "recipe.yml"), str(tmp_path / "ours"), "--device=cpu", "--quiet"]) == 0
    theirs, ours = weights(tmp_path / "theirs"), weights(tmp_path / "ours")
    assert theirs.keys() == ours.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=1e-5, atol=1e-6)


def test_without_acceleration_only_the_methods_are_ours(models, tmp_path):
    before = integration.calls()
    file = recipe(models, tmp_path / "recipe.yml", "task_arithmetic")
    assert main(["mergekit", "yaml", "--no-accelerate", file, str(tmp_path / "out"), *OPTIONS]) == 0
    assert integration.calls() == before
    assert main(["mergekit", "yaml", recipe(models, tmp_path / "r.yml", "tsvm"), str(tmp_path / "tsvm"), *OPTIONS]) == 0


def test_other_numbers_of_rows_are_refused(models, tmp_path):
    file = recipe(models, tmp_path / "recipe.yml", "tsvm", tuned=["a", "longer"])
    with pytest.raises(ValueError, match=r"size mismatch for .*Align vocabulary axes"):
        main(["mergekit", "yaml", file, str(tmp_path / "out"), *OPTIONS])


def test_mergekit_pytorch(models, tmp_path):
    content = {
        "merge_method": "rtsvm",
        "models": [{"model": str(models / name / "model.safetensors")} for name in "ab"],
        "base_model": str(models / "base" / "model.safetensors"),
        "dtype": "float32",
    }
    (tmp_path / "recipe.yml").write_text(json.dumps(content))
    arguments = [str(tmp_path / "recipe.yml"), str(tmp_path / "out"), "--no-cuda", "--quiet"]
    assert main(["mergekit", "pytorch", *arguments]) == 0
    assert main(["merge", arguments[0], str(tmp_path / "ours.safetensors"), "--device=cpu", "--quiet"]) == 0
    theirs, ours = weights(tmp_path / "out"), load_file(tmp_path / "ours.safetensors")
    assert theirs.keys() == ours.keys()
    for name in ours:
        torch.testing.assert_close(theirs[name], ours[name])


def test_mergekit_multi(models, tmp_path):
    first = json.loads(Path(recipe(models, tmp_path / "1.yml", "tsvm")).read_text()) | {"name": "first"}
    last = json.loads(Path(recipe(models, tmp_path / "2.yml", "rtsvm", tuned="ab")).read_text())
    last["models"].append({"model": "first", "parameters": {"weight": 0.5}})
    (tmp_path / "all.yml").write_text(f"{json.dumps(first)}\n---\n{json.dumps(last)}\n")
    out, between = tmp_path / "out", tmp_path / "between"
    arguments = [str(tmp_path / "all.yml"), "--intermediate-dir", str(between), "--out-path", str(out), *OPTIONS]
    assert main(["mergekit", "multi", *arguments]) == 0
    assert weights(out).keys() == weights(between / "first").keys() == weights(models / "base").keys()


def test_options_and_mistakes_are_mergekits(capsys):
    assert main(["mergekit", "yaml", "--help"]) == 0
    out = capsys.readouterr().out
    assert "rtsvm mergekit yaml" in out and "--lora-merge-cache" in out
    assert main(["mergekit", "yaml", "--no-such-option"]) == 2
    assert main(["mergekit", "multi", "--no-accelerate", "recipe.yml", "--no-such-option"]) == 2
