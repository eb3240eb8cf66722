"""Averages count a base that the recipe names but does not list, as mergekit does; its tests are in integrations/."""

import pytest
import torch
from checkpoints import save
from safetensors.torch import load_file
from test_adapter_inputs import WEIGHTS, config_for, inputs

from r_tsvm_kernels import ConfigError, MergeConfig, merge_checkpoints, merge_state_dicts
from r_tsvm_kernels.plan import make_plan

NAME = "model.layers.0.w.weight"


@pytest.fixture
def family(tmp_path):
    """Folders of a base and two models of one matrix, and the matrices in float64."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(16, 16, generator=generator)
    matrices = [base, *(base + 0.1 * torch.randn(16, 16, generator=generator) for _ in range(2))]
    paths = [save(tmp_path / name, {NAME: x}) for name, x in zip(("base", "a", "c"), matrices, strict=True)]
    return paths, [x.double() for x in matrices]


def merged(tmp_path, config):
    return load_file(merge_checkpoints(config, tmp_path / "out").path / "model.safetensors")[NAME].double()


def mean(matrices, weights):
    return sum(w * x for w, x in zip(weights, matrices, strict=True)) / sum(weights)


def test_it_has_the_weight_that_all_models_have(tmp_path, family):
    paths, matrices = family
    config = config_for(paths[0], paths[1:], "linear")
    assert (merged(tmp_path, config) - mean(matrices, [1, 1, 1])).abs().max() < 1e-6


def test_only_models_that_set_a_weight_have_another(tmp_path, family):
    paths, matrices = family
    models = ({"model": str(paths[1]), "parameters": {"weight": 0.5}}, {"model": str(paths[2])})
    config = MergeConfig(
        merge_method="linear", base_model=str(paths[0]), models=models, parameters={"weight": 2, "normalize": False}
    )
    exact = 2 * matrices[0] + 0.5 * matrices[1] + 2 * matrices[2]
    assert (merged(tmp_path, config) - exact).abs().max() < 2e-6


def test_listed_it_counts_once_under_any_name(tmp_path, family):
    paths, matrices = family
    models = [{"model": str(paths[1])}, {"model": f"{paths[0]}/../base", "parameters": {"weight": 3.0}}]
    config = MergeConfig(merge_method="linear", base_model=str(paths[0]), models=tuple(models))
    assert (merged(tmp_path, config) - mean(matrices[1::-1], [1, 3])).abs().max() < 1e-6


def test_a_slice_lists_all_of_its_models(tmp_path, family):
    paths, matrices = family
    config = config_for(paths[0], paths[1:], "linear", num_layers=1)
    assert (merged(tmp_path, config) - mean(matrices[1:], [1, 1])).abs().max() < 1e-6


def test_the_karcher_mean_of_a_model_and_the_base_is_halfway_between(tmp_path, family):
    paths, (base, model, _) = family
    got = merged(tmp_path, config_for(paths[0], [paths[1]], "karcher", parameters={"max_iter": 50, "tol": 1e-9}))
    middle = base / base.norm() + model / model.norm()
    exact = middle / middle.norm() * (base.norm() + model.norm()) / 2
    assert (got - exact).abs().max() < 1e-6


def test_the_recipe_of_the_output_gives_the_same_merge(tmp_path, family):
    paths, _ = family
    first = merge_checkpoints(config_for(paths[0], paths[1:], "linear"), tmp_path / "first").path
    again = MergeConfig.from_yaml(first / "merge_recipe.yaml")
    assert [entry.model for entry in again.models] == [str(path) for path in (*paths[1:], paths[0])]
    assert torch.equal(merged(tmp_path, again).float(), load_file(first / "model.safetensors")[NAME])


def test_tensors_in_memory_follow_the_recipe_too(family):
    paths, matrices = family
    base, *tuned = ({NAME: matrix} for matrix in matrices)
    got = merge_state_dicts(base, tuned, config_for(paths[0], paths[1:], "linear")).state_dict[NAME]
    assert (got - mean(matrices, [1, 1, 1])).abs().max() < 1e-12
    unnamed = merge_state_dicts(base, tuned, MergeConfig(merge_method="linear")).state_dict[NAME]
    assert (unnamed - mean(matrices[1:], [1, 1])).abs().max() < 1e-12


def test_weights_for_all_but_the_base_are_refused(family):
    paths, _ = family
    models = tuple({"model": str(path), "parameters": {"weight": 0.5}} for path in paths[1:])
    config = MergeConfig(merge_method="linear", base_model=str(paths[0]), models=models)
    with pytest.raises(ConfigError, match=r"merges the base, too, and .*base has no weight: list it under `models`"):
        make_plan(config, 10**9)


@pytest.mark.parametrize("normalize", [True, False])
def test_beside_adapters_it_is_an_update_of_rank_0(tmp_path, normalize):
    base, adapters, models = inputs(tmp_path)
    config = config_for(base, adapters, "linear", parameters={"normalize": normalize})
    plan = make_plan(config, 10**9)
    assert plan.keeps_factors("layers.0.q.weight")
    got = load_file(merge_checkpoints(config, tmp_path / "out").path / "model.safetensors")
    start = load_file(base / "model.safetensors")
    for name in (*(f"{name}.weight" for name in WEIGHTS), "norm.weight"):
        exact = (start[name].double() + models[0][name] + models[1][name]) / (3 if normalize else 1)
        assert (got[name] - exact).norm() < 1e-6 * exact.norm()


def test_a_base_alone_is_called_by_its_name(family):
    paths, _ = family
    with pytest.raises(ConfigError, match=r"no fine-tuned models: .*base is the base itself"):
        make_plan(config_for(paths[0], [paths[0]], "ties"), 10**9)


@pytest.mark.parametrize("method", ["linear", "karcher", "multislerp", "model_stock"])
def test_weights_that_cannot_be_normalised_are_refused_before_the_merge(tmp_path, family, method):
    paths, _ = family
    others = {f"model.layers.{i}.w.weight": torch.randn(16, 16) for i in range(1, 3)}
    for path in paths:
        save(path.with_name(f"deep_{path.name}"), load_file(path / "model.safetensors") | others)
    base, *models = (str(path.with_name(f"deep_{path.name}")) for path in paths)
    weight = [{"filter": "layers.2", "value": 0.0}, {"value": 1.0}]
    config = config_for(base, models, method, parameters={"weight": weight})
    with pytest.raises(ConfigError, match=r"^model.layers.2.w.weight: the weights .* sum to 0"):
        merge_checkpoints(config, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))
    kept = config_for(base, models, method, parameters={"weight": weight}, exclude=["*layers.2*"])
    merge_checkpoints(kept, tmp_path / "out")  # its weights are not needed
