"""Parts as adapters that PEFT loads: together, or combined into one, they are the merged model."""

import re
from pathlib import Path

import pytest
import torch
from families import FAMILIES, fine_tune, load, peft, run

from r_tsvm_kernels import MergeConfig, decompose_checkpoints, merge_checkpoints, parts_to_lora
from r_tsvm_kernels.cli import main

pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries warn about many things of their own

TASKS = ("math", "code", "chat")
# Families, with what adapters do not hold and is not merged here. Tied embeddings of T5 are the head, too.
LEFT_OUT = {
    "llama": ["*norm*", "*embed*", "lm_head*"],
    "llama, tied": ["*norm*", "*embed*"],
    "t5": ["*norm*", "shared*", "*relative_attention_bias*"],
}


@pytest.fixture(params=LEFT_OUT)
def models(request, tmp_path):
    """The name of a family; its base and three fine-tunes on disk."""
    family = FAMILIES[request.param]
    family.build().save_pretrained(tmp_path / "base")
    for seed, name in enumerate(TASKS):
        fine_tune(load(family, tmp_path / "base"), family, seed + 1).save_pretrained(tmp_path / name)
    return request.param, tmp_path


def recipe(name, folder, **options):
    paths = [folder / task for task in TASKS]
    return MergeConfig("tsvm", base_model=folder / "base", models=paths, exclude=LEFT_OUT[name], **options)


def with_adapters(family, folder):
    model = peft.PeftModel.from_pretrained(load(family, folder / "base"), folder / "adapters" / "math", "math")
    for name in TASKS[1:]:
        model.load_adapter(folder / "adapters" / name, name)
    return model


def merged(name, folder, **options):
    merge_checkpoints(recipe(name, folder, **options), folder / "out")
    return load(FAMILIES[name], folder / "out")


def assert_close(found, expected):
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], tensor, rtol=0, atol=2e-6)


def test_all_adapters_together_are_the_merged_model(models):
    name, folder = models
    family = FAMILIES[name]
    decompose_checkpoints(recipe(name, folder), folder / "parts")
    results = parts_to_lora(folder / "parts", folder / "adapters")
    assert all(result.left_out_energy == 0 for result in results.values())
    expected, model = merged(name, folder), with_adapters(family, folder)
    alone = run(model, family)
    model.base_model.set_adapter(list(TASKS))
    outputs = run(model, family)
    torch.testing.assert_close(outputs, run(expected, family), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(outputs, alone, rtol=1e-3, atol=1e-3)
    assert_close(model.merge_and_unload(adapter_names=list(TASKS)), expected)


def test_peft_combines_them_with_weights(models):
    """`cat` keeps every adapter; `add_weighted_adapter` then gives the merge of these weights."""
    name, folder = models
    family = FAMILIES[name]
    decompose_checkpoints(recipe(name, folder), folder / "parts")
    parts_to_lora(folder / "parts", folder / "adapters")
    weights = [0.7, 1.5, 0.2]
    model = with_adapters(family, folder)
    model.add_weighted_adapter(list(TASKS), weights, "cat", combination_type="cat")
    model.set_adapter("cat")
    expected = merged(name, folder, weight=weights)
    torch.testing.assert_close(run(model, family), run(expected, family), rtol=1e-4, atol=1e-4)
    assert_close(model.merge_and_unload(), expected)


def test_the_command_cuts_ranks_and_adapts_embeddings(models):
    family, folder = FAMILIES[models[0]], models[1]
    asked = [word for name in TASKS for word in ("--model", str(folder / name))]
    asked = ["decompose", "--base", str(folder / "base"), *asked, "--method", "tsvm", "--quiet", "--as-lora"]
    assert main([*asked, "--lora-rank", "3", str(folder / "adapters")]) == 0
    model = with_adapters(family, folder)
    ranks = {len(x) for name, x in model.state_dict().items() if "lora_A" in name}
    assert max(ranks) == 3
    model.base_model.set_adapter(list(TASKS))
    assert all(torch.isfinite(x).all() for x in run(model, family))


def test_the_example_of_the_documentation_runs(tmp_path, monkeypatch):
    family = FAMILIES["llama"]
    family.build().save_pretrained(tmp_path / "base")
    for seed, name in enumerate(TASKS[:2]):
        fine_tune(load(family, tmp_path / "base"), family, seed + 1).save_pretrained(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    models = ["--model", "math", "--model", "code", "--method", "tsvm"]
    assert main(["decompose", "--base", "base", *models, "--quiet", "--as-lora", "OUT"]) == 0
    page = (Path(__file__).parents[2] / "docs" / "lora.md").read_text()
    together, combined = re.search(r"```py\n(.*?)\n(model.add_weighted_adapter.*?)```", page, re.DOTALL).groups()
    names = {"PeftModel": peft.PeftModel, "base": load(family, "base")}
    answers = []
    for code in (together, combined + 'model.set_adapter("both")'):
        exec(compile(code, "lora.md", "exec"), names)  # our own text
        answers.append(run(names["model"], family))
    options = {"merge_method": "tsvm", "base_model": "base", "models": TASKS[:2], "exclude": LEFT_OUT["llama"]}
    for number, weights in enumerate(([1.0, 1.0], [0.8, 1.2])):
        merge_checkpoints(MergeConfig(**options, weight=weights), f"merged{number}")
        expected = run(load(family, f"merged{number}"), family)
        torch.testing.assert_close(answers[number], expected, rtol=1e-4, atol=1e-4)
