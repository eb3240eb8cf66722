"""Configs say how many layers a model has, and whether two models' weights mean the same."""

import pytest

from r_tsvm_kernels.checkpoint import contradictions, layer_count
from r_tsvm_kernels.checkpoint.prefixes import same_but_for_prefix, without_prefix
from r_tsvm_kernels.parameters import layer_positions

LLAMA = {"model_type": "llama", "rope_theta": 1e4, "num_attention_heads": 8, "rope_scaling": None}


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"num_hidden_layers": 4}, (4, 0)),
        ({"n_layer": 4}, (4, 0)),
        ({"num_hidden_layers": 4, "num_nextn_predict_layers": 1}, (4, 1)),
        ({"num_hidden_layers": 9, "text_config": {"num_hidden_layers": 4}}, (4, 0)),
        ({"num_hidden_layers": True}, None),
        ({}, None),
    ],
)
def test_layers(config, found):
    assert layer_count(config) == found


def test_a_layer_behind_the_last_one_has_its_position():
    names = [f"model.layers.{i}.w" for i in range(4)] + ["vision.layers.0.w", "vision.layers.7.w"]
    assert list(layer_positions(names, 3, 1).values()) == [0.0, 0.5, 1.0, 1.0, 0.0, 1.0]
    assert list(layer_positions(names).values())[:4] == [0.0, 1 / 3, 2 / 3, 1.0]


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({}, []),
        ({"rope_theta": 1e6}, ["rope_theta 1000000.0 instead of 10000.0"]),
        (
            {"rope_theta": None, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}},
            ["rope_theta 1000000.0"],
        ),
        ({"num_attention_heads": 4, "model_type": "mistral"}, ["model_type mistral", "num_attention_heads 4"]),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            ["rope_type linear", "rope_factor 2.0"],
        ),
        ({"vocab_size": 7, "hidden_size": 9, "torch_dtype": "float16"}, []),
    ],
)
def test_contradictions(other, words):
    found = contradictions(LLAMA, LLAMA | other)
    assert len(found) == len(words)
    assert all(text.startswith(word) for text, word in zip(found, words, strict=True))


def test_nested_contradictions():
    whole = {"model_type": "llava", "text_config": {"model_type": "llama", "head_dim": 8}}
    assert contradictions(whole, {"model_type": "llama", "head_dim": 4}) == ["head_dim 4 instead of 8"]
    assert contradictions(whole, whole | {"model_type": "idefics"}) == ["top-level model_type idefics instead of llava"]


def test_prefixes():
    old = ["language_model.model.layers.0.w", "language_model.lm_head.weight", "vision_tower.layers.0.w"]
    new = ["model.language_model.layers.0.w", "lm_head.weight", "model.vision_tower.layers.0.w"]
    assert same_but_for_prefix(old, new) == dict(zip(old, new, strict=True))
    assert same_but_for_prefix(["bert.a"], ["a", "model.a"]) == {}  # two are alike
    assert same_but_for_prefix(["encoder.layers.0.w"], ["decoder.layers.0.w"]) == {}  # a module, not a wrapper
    assert same_but_for_prefix(["model.a", "a"], ["a", "b"]) == {}  # the name is taken
    assert without_prefix("model") == "model"
