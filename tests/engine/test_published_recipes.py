"""Recipes in the forms in which people publish them: all run, and only mistakes are refused."""

import json
import re
from pathlib import Path

import pytest
import torch
from adapters import random_adapter
from checkpoints import save
from safetensors.torch import load_file

from r_tsvm_kernels import ConfigError, MergeConfig, merge_checkpoints

FILE = Path(__file__).parents[1] / "recipes.yaml"
RECIPES = [text.replace("--- #\n", "---\n") for text in re.split(r"^---\n", FILE.read_text(), flags=re.MULTILINE)]
LAYERS = 8
SHAPES = {"self_attn.q_proj": (8, 8), "self_attn.o_proj": (8, 8), "mlp.down_proj": (8, 12), "input_layernorm": (8,)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models of one architecture and one tokenizer, and an adapter, under the names of the recipes."""
    found, generator = tmp_path_factory.mktemp("models"), torch.Generator().manual_seed(0)

    def draw(shape, scale):
        return (scale * torch.randn(shape, generator=generator)).bfloat16()

    names = {f"model.layers.{i}.{part}.weight": shape for i in range(LAYERS) for part, shape in SHAPES.items()}
    names |= {"model.embed_tokens.weight": (20, 8), "model.norm.weight": (8,), "lm_head.weight": (20, 8)}
    base = {name: draw(shape, 1) for name, shape in names.items()}
    shared = {name: draw(shape, 0.05) for name, shape in names.items()}
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": LAYERS}
    vocabulary = {f"t{i}": i for i in range(19)} | {"<|im_end|>": 19}
    for model in ("base", "a", "b", "c"):
        step = 0 if model == "base" else 1
        own = {n: t + step * (shared[n] + draw(t.shape, 0.05)) for n, t in base.items()}
        path = save(found / model, own, config=config)
        tokenizer = {"model": {"type": "BPE", "vocab": vocabulary, "merges": []}, "added_tokens": []}
        (path / "tokenizer.json").write_text(json.dumps(tokenizer))
        (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    shapes = {f"model.layers.{i}.mlp.down_proj": (8, 12) for i in range(LAYERS)}
    random_adapter(found / "lora", 1, rank=2, shapes=shapes)
    return found


def label(text):
    return f"{RECIPES.index(text)} {re.search('merge_method: ([a-z_]+)', text)[1]}"


def test_there_are_enough():
    assert len(RECIPES) >= 60 and len(set(RECIPES)) == len(RECIPES)


@pytest.mark.parametrize("text", RECIPES, ids=label)
def test_recipes(folder, tmp_path, monkeypatch, text):
    monkeypatch.chdir(folder)
    recipe = tmp_path / "recipe.yaml"
    body, _, refusal = text.partition("refused: ")
    recipe.write_text(body)
    if refusal:
        with pytest.raises(ConfigError, match=re.escape(refusal.strip())):
            merge_checkpoints(recipe, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return
    out = merge_checkpoints(recipe, tmp_path / "out").path
    tensors = load_file(out / "model.safetensors")
    config = json.loads((out / "config.json").read_text())
    layers = {int(name.split(".")[2]) for name in tensors if ".layers." in name}
    assert layers == set(range(config["num_hidden_layers"]))
    assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())
    MergeConfig.from_yaml(out / "merge_recipe.yaml", strict=True)  # nothing is left that has no meaning
