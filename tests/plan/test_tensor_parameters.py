"""Parameters as the recipe writes them, and as tensors get them."""

import json

from checkpoints import family
from hypothesis import given
from hypothesis import strategies as st

from r_tsvm_kernels import MergeConfig, merge_checkpoints
from r_tsvm_kernels.methods import METHODS
from r_tsvm_kernels.plan import common_parameters, model_parameters, varying_parameters


def test_defaults_of_every_method_are_json():
    for name, method in METHODS.items():
        found = json.loads(json.dumps(common_parameters(MergeConfig(name))))
        assert found.keys() == method.parameters.model_fields.keys()
        assert found["weight"] == 1.0
        assert varying_parameters(MergeConfig(name), MergeConfig(name).options(method.tasks or 1, "w")) == {}


def test_gradients_and_filters_stay_as_they_are_written():
    density = [{"filter": "mlp", "value": 0.5}, {"value": [0.2, 1.0]}]
    models = ({"model": "a", "parameters": {"weight": [0.0, 1.0]}}, {"model": "b"})
    config = MergeConfig("rtsvm", models=models, parameters={"lambda": [0.6, 1.0], "density": density})
    common = common_parameters(config)
    assert (common["alpha"], common["density"], common["weight"]) == ([0.6, 1.0], density, 1.0)
    assert model_parameters(config) == [{"weight": [0.0, 1.0]}, {}]

    def of(name, position):
        return varying_parameters(config, config.options(2, name, position))

    assert of("layers.0.mlp", 0.0) == {"weight": [0.0, 1.0], "alpha": 0.6, "density": [0.5, 0.5]}
    assert of("layers.1.attn", 1.0) == {"weight": [1.0, 1.0], "alpha": 1.0, "density": [1.0, 1.0]}


@given(st.floats(0.1, 1.0), st.booleans())
def test_plain_values_do_not_vary(density, own):
    given = {"density": density}
    models = tuple({"model": name, "parameters": given if own else {}} for name in "ab")
    config = MergeConfig("ties", models=models, parameters={} if own else given)
    assert varying_parameters(config, config.options(2, "w")) == {}
    assert (model_parameters(config), common_parameters(config)["density"]) == (
        ([given] * 2, METHODS["ties"].parameters().density[0]) if own else ([{}, {}], density)
    )


def test_the_report_of_a_merge_has_them(tmp_path):
    paths, _, _ = family(tmp_path / "in")
    base, *tuned = map(str, paths)
    recipe = {"alpha": [0.5, 1.0], "density": [{"filter": "mlp", "value": 0.25}, {"value": 1.0}]}
    config = MergeConfig("ties", base_model=base, models=tuned, parameters=recipe, exclude=("*.1.attn*",))
    report = json.loads(merge_checkpoints(config, tmp_path / "out").report_path.read_text())
    assert report["parameters"] == common_parameters(config)
    assert report["parameters"] | recipe == report["parameters"] and report["model_parameters"] == [{}, {}]
    found = {name: entry["parameters"] for name, entry in report["tensors"].items()}
    assert found["model.layers.0.mlp.weight"] == {"alpha": 0.5, "density": [0.25, 0.25]}
    assert found["model.layers.1.mlp.weight"] == {"alpha": 1.0, "density": [0.25, 0.25]}
    assert found["model.layers.0.attn.weight"] == {"alpha": 0.5, "density": [1.0, 1.0]}
    assert found["model.layers.1.attn.weight"] == found["mask"] == {}
    journal = json.loads((tmp_path / "out" / "merge_journal.jsonl").read_text().splitlines()[0])
    assert report["kernels"] == journal["kernels"] and report["kernels"]["elect_and_sum"] in ("cpu", "torch", "triton")
