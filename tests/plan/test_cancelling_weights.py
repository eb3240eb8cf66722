"""Weights that cannot be divided by their sum are refused by the plan, before a value is read."""

import json

import pytest
import torch
from checkpoints import save

from r_tsvm_kernels import ConfigError, MergeConfig, merge_checkpoints
from r_tsvm_kernels.cli import main
from r_tsvm_kernels.methods import METHODS
from r_tsvm_kernels.plan import make_plan

SHARES = ["task_arithmetic", "dare_linear", "della_linear", "breadcrumbs"]
ELECTIONS = ["ties", "dare_ties", "della", "breadcrumbs_ties"]


@pytest.fixture
def cancelling(tmp_path):
    """The fields of recipes whose weights cancel in layer 1 of 3."""
    names = [f"model.layers.{layer}.w.weight" for layer in range(3)]
    base, first, second = (str(save(tmp_path / path, {name: torch.randn(16, 16) for name in names})) for path in "abc")
    models = [{"model": first, "parameters": {"weight": [1.0, 0.5, 0.0]}}, {"model": second}]
    return {"base_model": base, "models": models, "weight": -0.5, "normalize": True}


def test_every_method_that_normalises_is_tried():
    assert {*SHARES, *ELECTIONS, "linear"} == {
        name for name, method in METHODS.items() if "normalize" in method.parameters.model_fields
    }


@pytest.mark.parametrize("method", SHARES)
def test_the_plan_refuses_shares_of_weights_that_cancel(tmp_path, capsys, cancelling, method):
    with pytest.raises(ConfigError, match=r"^model.layers.1.w.weight: the weights \[0.5, -0.5\] sum to 0"):
        make_plan(MergeConfig(method, **cancelling), 10**9)
    recipe = tmp_path / "recipe.yaml"
    parameters = {"weight": cancelling.pop("weight"), "normalize": cancelling.pop("normalize")}
    recipe.write_text(json.dumps({"merge_method": method, "parameters": parameters, **cancelling}))
    assert main(["inspect", str(recipe)]) != 0
    assert "model.layers.1.w.weight" in capsys.readouterr().err
    # Where every weight is 0, the base stays.
    kept = {**cancelling, "models": [entry["model"] for entry in cancelling["models"]]}
    weight = [{"filter": "layers.2", "value": 0.0}, {"value": 1.0}]
    make_plan(MergeConfig(method, weight=weight, normalize=True, **kept), 10**9)


@pytest.mark.parametrize("method", ELECTIONS)
def test_elections_take_weights_that_cancel(tmp_path, cancelling, method):
    merge_checkpoints(MergeConfig(method, **cancelling), tmp_path / "out")
