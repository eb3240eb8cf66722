"""Tied tensors are merged once, and are tied afterwards."""

import pytest
import torch

from r_tsvm_kernels import MergeConfig, ModelEntry, merge_state_dicts, merge_tensors
from r_tsvm_kernels.methods import METHODS
from r_tsvm_kernels.tied import is_copy, same_memory, tied_names

SHAPE = (20, 8)


def group(tasks=2, dtype=torch.float32, seed=0):
    """An embedding and a matrix, of the base and of its fine-tunes."""
    generator = torch.Generator().manual_seed(seed)
    base = {"model.embed": torch.randn(SHAPE, generator=generator), "w": torch.randn(8, 8, generator=generator)}
    tuned = [
        {name: t + 0.1 * torch.randn(t.shape, generator=generator) for name, t in base.items()} for _ in range(tasks)
    ]
    return [{name: t.to(dtype) for name, t in model.items()} for model in (base, *tuned)]


def with_head(model, copy=False):
    return {"head": model["model.embed"].clone() if copy else model["model.embed"], **model}


def merged(models, config):
    return merge_state_dicts(models[0], models[1:], config)


def config_of(method):
    own = {"density": 0.5} if "density" in METHODS[method].parameters.model_fields else {}
    return MergeConfig(merge_method=method, parameters=own)


@pytest.mark.parametrize("copies", [False, True], ids=["tied", "copied"])
@pytest.mark.parametrize("method", sorted(METHODS))
def test_they_are_the_tensor_of_the_last_name(method, copies):
    models = group(METHODS[method].tasks or 2)
    found = merged([with_head(model, copies) for model in models], config_of(method))
    assert same_memory(found.state_dict["model.embed"], found.state_dict["head"]) is not copies
    base, *tuned = (model["model.embed"] for model in models)
    alone = merge_tensors(base, tuned, config_of(method), name="model.embed").weight
    for name in ("model.embed", "head"):
        assert torch.equal(found.state_dict[name], alone)
    assert found.reports["head"].reason == "tied to model.embed" and found.reports["head"].shape == SHAPE
    assert list(found.state_dict) == list(found.reports) == ["head", "model.embed", "w"]


def test_one_model_that_has_two_tensors_makes_two():
    models = [with_head(model) for model in group()]
    models[2]["head"] = models[2]["model.embed"] + 1
    config = config_of("dare_linear")
    found = merged(models, config).state_dict
    for name in ("model.embed", "head"):
        exact = merge_tensors(models[0][name], [m[name] for m in models[1:]], config, name=name).weight
        assert torch.equal(found[name], exact)
    assert not torch.equal(found["model.embed"], found["head"])


@pytest.mark.parametrize(
    "changes",
    [
        {"exclude": ("head",)},
        {"parameters": {"density": [{"filter": "head", "value": 0.9}, {"value": 0.5}]}},
        {"models": (ModelEntry(parameters={"weight": [{"filter": "head", "value": 0.1}]}), ModelEntry())},
    ],
    ids=["excluded", "density", "weight"],
)
def test_a_recipe_may_treat_them_apart(changes):
    models = [with_head(model) for model in group()]
    config = MergeConfig(**({"merge_method": "dare_ties", "parameters": {"density": 0.5}} | changes))
    found = merged(models, config).state_dict
    exact = merge_tensors(models[0]["head"], [m["head"] for m in models[1:]], config, name="head").weight
    assert torch.equal(found["head"], exact) and not torch.equal(found["model.embed"], exact)


def test_layers_that_are_tied_differ_where_a_gradient_does():
    tensors = group()
    models = [{f"layers.{i}.w": model["w"] for i in range(3)} for model in tensors]
    same = merged(models, MergeConfig(merge_method="task_arithmetic", parameters={"alpha": [0.5, 0.5]})).state_dict
    assert same_memory(same["layers.0.w"], same["layers.2.w"])
    other = merged(models, MergeConfig(merge_method="task_arithmetic", parameters={"alpha": [0.0, 1.0]})).state_dict
    base, update = tensors[0]["w"], sum(model["w"] - tensors[0]["w"] for model in tensors[1:])
    for layer in range(3):
        torch.testing.assert_close(other[f"layers.{layer}.w"], base + layer / 2 * update)


def test_what_counts_as_tied():
    x = torch.arange(12.0).reshape(3, 4)
    base = {"a": x, "other": x + 1, "view": x[:2], "b": x.clone(), "turned": x.T, "half": x.half(), "row": x[:1]}
    assert tied_names(base, [dict(base)]) == {"a": "b"}
    assert tied_names(base, [{**base, "b": x * 2}]) == {}
    integers = {"a": torch.arange(3), "b": torch.arange(3), "empty": torch.empty(0), "none": torch.empty(0)}
    assert tied_names(integers, [integers]) == {}
    nan = torch.tensor([1.0, torch.nan])
    assert is_copy(nan, nan) and not is_copy(nan, nan.clone())
    assert not same_memory(x, x.T) and not same_memory(x[:1], x[1:2]) and same_memory(x, x.detach())
    square = torch.ones(3, 3)
    assert not same_memory(square, square.T) and is_copy(square, square.T)
