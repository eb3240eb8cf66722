import os

import numpy as np
import pytest
import torch
from merging import tasks_of

from r_tsvm_kernels import ConfigError, MergeConfig, ModelEntry, merge_state_dicts
from r_tsvm_kernels.methods import METHODS

RECIPE = """
merge_method: rtsvm
base_model: models/base
models:
  - model: models/base
  - model: models/a
    parameters:
      weight: 0.5
      density:
        - filter: mlp
          value: [0.2, 0.4]
        - value: 0.9
  - model: models/b
parameters:
  weight: 2
  lambda: 0.7
dtype: bfloat16
out_dtype: float32
tokenizer_source: base
"""


# As most published recipes of SLERP have it.
SLICE = {
    "sources": [{"model": "a", "layer_range": [0, 4]}, {"model": "b", "layer_range": [0, 4]}],
    "parameters": {"t": [{"filter": "mlp", "value": [0, 1]}, {"value": 0.5}]},
}


def write(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def test_a_recipe_in_mergekit_s_format(tmp_path):
    config = MergeConfig.from_yaml(write(tmp_path, RECIPE))
    assert [entry.model for entry in config.models] == ["models/base", "models/a", "models/b"]
    assert (config.dtype, config.out_dtype) == ("bfloat16", "float32")
    options = config.options(3, "layers.0.mlp.up", 0.5)
    assert options.weight == (2.0, 0.5, 2.0)  # a model's own value before the global one
    assert options.density == (1.0, pytest.approx(0.3), 1.0)
    assert config.options(3, "layers.0.attn.q", 0.5).density == (1.0, 0.9, 1.0)
    assert options.alpha == 0.7


def test_the_recipe_survives_a_round_trip(tmp_path):
    config = MergeConfig.from_yaml(write(tmp_path, RECIPE))
    assert MergeConfig.from_yaml(write(tmp_path, config.to_yaml())) == config
    plain = MergeConfig("linear")
    assert MergeConfig.from_yaml(write(tmp_path, plain.to_yaml())) == plain


def test_a_slice_of_whole_models_is_a_list_of_models(tmp_path):
    common = {"merge_method": "slerp", "dtype": "bfloat16"}
    config = MergeConfig.from_dict({**common, "base_model": "a", "slices": [SLICE], "parameters": {"t": 0.1}})
    models = [{"model": "a"}, {"model": "b"}]
    assert config == MergeConfig.from_dict(
        {**common, "base_model": "a", "models": models, "parameters": SLICE["parameters"], "num_layers": 4}
    )
    assert MergeConfig.from_yaml(write(tmp_path, config.to_yaml())) == config
    assert MergeConfig.from_dict({**common, "slices": [SLICE, SLICE]}).slices[1].count == 4
    weighted = [source | {"parameters": {"weight": w}} for source, w in zip(SLICE["sources"], (1, 3), strict=True)]
    config = MergeConfig.from_dict({"merge_method": "ties", "slices": [{"sources": weighted, "base_model": "c"}]})
    assert (config.base_model, config.options(2).weight) == ("c", (1.0, 3.0))


@pytest.mark.parametrize(
    ("source", "vocabulary"),
    [("base", "base"), ("union", "union"), ("org/chat", "model:org/chat"), ("model:org/chat", "model:org/chat")],
)
def test_the_spellings_of_the_tokenizer_s_source(source, vocabulary):
    config = MergeConfig.from_dict({"merge_method": "linear", "tokenizer": {"source": source, "tokens": None}})
    assert config == MergeConfig.from_dict({"merge_method": "linear", "tokenizer_source": source})
    assert config.vocabulary == vocabulary
    assert config == MergeConfig.from_dict({"merge_method": "linear", "vocabulary": vocabulary})
    assert MergeConfig.from_dict({"merge_method": "linear", "tokenizer": {"source": None}}).vocabulary == "union"


def test_empty_values_count_as_absent():
    assert MergeConfig.from_dict({"merge_method": "linear", "slices": None, "dtype": None}).merge_method == "linear"


def test_methods_go_by_the_names_of_other_tools():
    assert MergeConfig(merge_method="ties_merging").method is METHODS["ties"]
    assert MergeConfig(merge_method="weighted_average").method is METHODS["linear"]
    assert MergeConfig("resm", rank=3).method is METHODS["rtsvm"]
    names = [name for method in METHODS.values() for name in (method.name, *method.aliases)]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_defaults_of_every_method_are_valid(method):
    tasks = tasks_of(method, 4)
    options = MergeConfig(merge_method=method).options(tasks)
    assert options.weight == (1.0,) * tasks


def test_parameters_are_keywords():
    config = MergeConfig("rtsvm", weight=[1, 2], density=0.3, rank=16)
    options = config.options(2)
    assert (options.weight, options.density, options.rank) == ((1.0, 2.0), (0.3, 0.3), (16, 16))
    with pytest.raises(ConfigError, match="weight: got 2 for 3 fine-tuned models"):
        config.options(3)
    assert MergeConfig("ties", weight=(1, 2), density=[0.1, 0.2]).options(2).density == (0.1, 0.2)
    assert MergeConfig("ties", weight=np.array([1, 2]), alpha=torch.tensor(0.5)).options(2).weight == (1.0, 2.0)
    assert MergeConfig("ties", weight=None, density=None) == MergeConfig("ties")
    assert MergeConfig("ties", parameters={"density": [0.1, 0.2]}).options(2, "layers.1.w", 1.0).density == (0.2, 0.2)
    with_models = MergeConfig("ties", base_model="b", models=["a", "c"], weight=[1.0, 2.0], density=0.3)
    entries = tuple({"model": name, "parameters": {"weight": weight}} for name, weight in (("a", 1.0), ("c", 2.0)))
    assert with_models == MergeConfig("ties", base_model="b", models=entries, parameters={"density": 0.3})


@pytest.mark.parametrize("method", sorted(METHODS))
def test_no_parameter_has_the_name_of_a_field(method):
    assert not METHODS[method].parameters.names().keys() & MergeConfig.model_fields.keys()


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"weights": [1, 2]}, "unknown key 'weights'; did you mean 'weight'"),
        ({"densty": 1}, r"'density'\? Recipe fields: base_model, .*models, .*; parameters of ties: alpha, .*density"),
        ({"parameters": {"densty": 1}}, r"'density'\? Parameters of ties: alpha, density, (?!.*models)"),
        ({"parameters": {"dtype": "float32"}}, "'dtype' is a recipe field, .* outside `parameters`"),
        ({"exclud": "a"}, "did you mean 'exclude'"),
        ({"weight": [1, 2], "density": [0.1]}, r"density: got 1 value\(s\) for 2 models"),
        ({"models": ["a"], "weight": [1, 2]}, r"weight: got 2 value\(s\) for 1 models"),
        ({"density": 0.1, "parameters": {"density": 0.2}}, "density is given twice"),
        ({"alpha": 0.1, "parameters": {"lambda": 0.2}}, "alpha is given twice"),
        ({"density": 0.1, "parameters": 3}, "parameters: should be a mapping.*, got 3"),
        ({"weight": [1], "models": 3}, "models: should be a list, got 3"),
        ({"weight": [1], "models": [3]}, "models: .*, got 3"),
        ({"merge_method": "tsvm"}, "two methods: 'ties' and merge_method='tsvm'"),
        ({"density": 2}, "parameters of ties: density: should be less than or equal to 1, got 2"),
        ({"density": []}, r"density: got 0 value\(s\) for 0 models; give one per model"),
        ({"parameters": {"density": []}}, r"density: should be a number or one per model, got \[\]"),
        ({"out_dtype": torch.int8}, "out_dtype: should be 'float64'.*, got 'int8'"),
    ],
    ids=str,
)
def test_mistakes_in_keywords(keywords, message):
    with pytest.raises(ConfigError, match=message):
        MergeConfig("ties", **keywords)


@pytest.mark.parametrize(
    "text",
    [
        "MergeConfig('ties', weight=[1.0, 0.5], density=0.2)",
        "MergeConfig('rtsvm', base_model='b', models=['a', 'c'], out_dtype='bfloat16')",
        "MergeConfig('rtsvm', models=[ModelEntry(model='a', parameters={'weight': 2.0}), 'c'])",
        "MergeConfig('ties', parameters={'density': [0.1, 0.3]})",
        "MergeConfig('ties', parameters={'lambda': 0.5})",
        "MergeConfig('linear')",
    ],
)
def test_a_config_is_shown_as_the_call_that_makes_it(text):
    config = eval(text, {"MergeConfig": MergeConfig, "ModelEntry": ModelEntry})
    assert repr(config) == str(config) == text


@pytest.mark.parametrize("dtype", ["bfloat16", "torch.bfloat16", torch.bfloat16])
def test_dtypes_by_name_or_as_they_are(dtype):
    config = MergeConfig("linear", dtype=dtype, out_dtype=dtype)
    assert (config.dtype, config.out_dtype) == ("bfloat16", "bfloat16")


def test_a_gradient_of_ranks_gives_whole_ranks():
    config = MergeConfig("rtsvm", parameters={"rank": [10, 21]})
    assert [config.options(1, "layers.1.w", t).rank for t in (0.0, 0.5, 1.0)] == [(10,), (15,), (21,)]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"merge_method": "ties", "density": 0.1}, "unknown key 'density': .* under `parameters`"),
        (
            {"merge_method": "ties", "densty": 1},
            "'density', under `parameters`.* fields: .*; parameters of ties: ",
        ),
        ({"merge_metod": "linear"}, "'merge_metod'; did you mean 'merge_method'"),
        ({"merge_method": "tsmv"}, "unknown merge method 'tsmv'; did you mean 'tsvm'"),
        ({"merge_method": "rtsvm", "parameters": {"densty": 1}}, "unknown key 'densty'; did you mean 'density'"),
        ({"models": [{"model": "a", "parameters": {"wieght": 1}}]}, "model a: unknown key 'wieght'; .* 'weight'"),
        ({"models": [{"model": "a", "parameters": {"alpha": 1}}]}, "alpha is one value for all models"),
        ({"models": [{"modle": "a"}]}, "unknown key 'modle'; did you mean 'model'"),
        ({"models": "a"}, "models: .*list"),
        ({"merge_method": "rtsvm", "parameters": {"density": 1.5}}, "density.*less than or equal to 1"),
        ({"merge_method": "rtsvm", "parameters": {"density": [0.5, 1.5]}}, "density.*less than or equal to 1"),
        ({"merge_method": "rtsvm", "parameters": {"density": [{"filter": "x", "value": -1}]}}, "density.*greater"),
        ({"merge_method": "rtsvm", "parameters": {"density": [{"filters": "x", "value": 1}]}}, "`value`.*`filter`"),
        ({"merge_method": "rtsvm", "parameters": {"rank": "best"}}, "rank.*'sparsity', .*'fixed'"),
        ({"merge_method": "rtsvm", "parameters": {"rank": 0}}, "rank"),
        ({"merge_method": "rtsvm", "parameters": {"rank": -0.5}}, "rank"),
        ({"merge_method": "rtsvm", "parameters": {"outlier_weighting": "squash"}}, "outlier_weighting.*'clip'"),
        ({"merge_method": "tsvm", "parameters": {"weight": float("nan")}}, "weight.*finite"),
        ({"merge_method": "tsvm", "parameters": {"alpha": 1, "lambda": 2}}, "alpha is given twice"),
        ({"dtype": "int8"}, "dtype.*'float64'"),
        ({"slices": [{}]}, "slices: `sources` is a list"),
        ({"slices": [{"sources": [{"model": "a"}]}]}, r"slices: a needs layer_range: \[first.*got None"),
        ({"slices": [{"sources": [{"model": "a", "layer_range": [3, 3]}]}]}, r"layer_range of a: .*\[3, 3\]"),
        ({"slices": [{"sources": [{"model": "a", "layer_range": [4, 2]}]}]}, r"layer_range of a: .*\[4, 2\]"),
        ({"slices": [{"sources": [{"model": "a", "layer_range": [-1, 2]}]}]}, r"layer_range of a: .*\[-1, 2\]"),
        ({"slices": [SLICE | {"parameters": [1]}]}, r"parameters: expected a mapping.*\[1\]"),
        ({"slices": [SLICE], "parameters": 3}, "parameters: expected a mapping.*3"),
        ({"slices": [SLICE | {1: 2}]}, "slices: expected a mapping with `sources`"),
        ({"slices": [SLICE | {"suorces": 2}]}, "unknown key 'suorces'; did you mean 'sources'"),
        ({"slices": [SLICE], "models": [{"model": "a"}]}, "models, slices: a recipe has one of"),
        (
            {"slices": [{"sources": [{"model": "a", "layer_range": [0, n]} for n in (8, 9)]}]},
            r"slices: expected sources with as many layers each, got \[0, 8\] of a, \[0, 9\] of a",
        ),
        ({"modules": {"a": {}}}, "modules: expected either `models` or `slices`"),
        ({"modules": {"a": 3}}, "modules: a: expected a mapping with `models` or `slices`, got 3"),
        ({"modules": {"a": {"slcies": []}}}, "unknown key 'slcies'; did you mean 'slices'"),
        ({"models": [{"model": {"place": "x"}}]}, "models: expected a path, or a mapping"),
        ({"merge_method": "ties", "models": [{"model": "a", "density": 1}]}, "density is a parameter; write it under"),
        (
            {"tokenizer": {"tokens": {"<s>": {"force": True}}}},
            "tokenizer: <s>: force needs a source: the model whose row",
        ),
        (
            {"tokenizer": {"tokens": {"<s>": {"source": {"kind": "zero"}}}}},
            "tokenizer: <s>: the rows of a token come from a model, not from 'zero'; `rtsvm mergekit yaml",
        ),
        (
            {"tokenizer": {"pad_to": 64}},
            "tokenizer: unknown key 'pad_to'; it has source, tokens and pad_to_multiple_of",
        ),
        ({"tokenizer": {"pad_to_multiple_of": 8}, "pad_to_multiple_of": 8}, "pad_to_multiple_of is given twice"),
        ({"tokens": {"<s>": {"model": "a"}}}, "tokens: needs a vocabulary to change; set `vocabulary`"),
        ({"vocabulary": "base", "tokens": {"<s>": {"model": "a", "row": 1}}}, "tokens"),
        ({"tokenizer": {"source": "base"}, "tokenizer_source": "base"}, "tokenizer_source and tokenizer: .* one of"),
        ({"tokenizer": "base"}, "tokenizer: expected a mapping with `source`, got 'base'"),
        ({"tokenizer_source": ["a"]}, "tokenizer_source: expected base, union or the path"),
        ({"vocabulary": "largest"}, "vocabulary: expected 'base', 'union' or 'model:PATH', got 'largest'"),
        ({"vocabulary": "model:"}, "vocabulary: expected 'base'"),
        ({"missing": "mean"}, "missing: .*'mean_of_present'"),
        ([1, 2], "mapping"),
        ({1: 2}, "mapping"),
        ({"models": [{1: 2}]}, "models: the keys of an entry are .*{1: 2}"),
        ({"models": [{"model": "a", "parameters": 5}]}, "parameters.*mapping.*, got 5"),
        ({"parameters": {"density": [{"filter": 5, "value": 1}]}}, "density: `filter` is a part .*, got 5"),
        ({"parameters": {"density": {"filter": ["a"], "value": 1}}}, r"density: `filter` is a part .*, got \['a'\]"),
        ({"parameters": {"density": [{"value": [{"filter": 5, "value": 1}]}]}}, "`filter` is a part .*, got 5"),
        ({"parameters": {"density": [{"value": [{"filter": "a"}]}]}}, "needs `value`"),
        ({"parameters": {"density": {"worth": 1}}}, "needs `value`"),
        ({"parameters": {"density": "x" * 10**6}}, r"got 'x{76}\.\.\.$"),
    ],
    ids=lambda value: str(value)[:80],
)
def test_mistakes_are_named(data, message):
    with pytest.raises(ConfigError, match=message):
        MergeConfig.from_dict(data)


def test_mistakes_of_the_constructor_are_config_errors():
    with pytest.raises(ConfigError, match="did you mean 'exclude'"):
        MergeConfig(exclud=("a",))
    with pytest.raises(ValueError, match="unknown merge method"):
        MergeConfig(merge_method="nope")


DOCUMENTS = """
name: first
merge_method: linear
models: [a, b]
---
merge_method: slerp
base_model: second
models: [first+lora]
---
name: second
merge_method: passthrough
models: [first]
"""


def test_several_documents(tmp_path):
    config = MergeConfig.from_yaml(write(tmp_path, DOCUMENTS))
    assert (config.merge_method, list(config.steps)) == ("slerp", ["first", "second"])
    assert config.steps["second"].models[0].model == "first"
    assert MergeConfig.from_yaml(write(tmp_path, config.to_yaml())) == config
    unnamed = "\n".join(DOCUMENTS.splitlines()[1:])
    assert MergeConfig.from_yaml(write(tmp_path, f"---\n{unnamed}\n---\n")) == config
    named = DOCUMENTS.replace("merge_method: slerp", "name: last\nmerge_method: slerp")  # the only one that none uses
    assert MergeConfig.from_yaml(write(tmp_path, named)) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("name: second", "name: first"), "documents: two are called first"),
        (("name: second\n", ""), "documents: two have no name"),
        (("models: [a, b]", "models: [second]"), "documents: .*first.* use each other in a circle"),
        (("models: [a, b]", "models: [first]"), "documents: first use each other in a circle"),
        (("name: first", "name: ../first"), "name: expected text that can be the name of a folder"),
        (("name: first", "name: 3"), "name: expected text .* got 3"),
        (("models: [a, b]", "models_: [a, b]"), "did you mean 'models'"),
        (("merge_method: slerp", "name: last\nmerge_method: linear\n---\nname: also\nmerge_method: slerp"),
         r"documents: last, also are used by no other; .* `rtsvm mergekit multi RECIPE OUT`"),
        (("---", "--- []\n---"), "a recipe is a mapping, got nothing"),
    ],
    ids=str,
)  # fmt: skip
def test_documents_that_are_refused(tmp_path, change, message):
    assert change[0] in DOCUMENTS
    with pytest.raises(ConfigError, match=message):
        MergeConfig.from_yaml(write(tmp_path, DOCUMENTS.replace(*change, 1)))


def test_an_empty_file_is_no_recipe(tmp_path):
    with pytest.raises(ConfigError, match="a recipe is a mapping, got nothing"):
        MergeConfig.from_yaml(write(tmp_path, ""))


@pytest.mark.parametrize("text", ["merge_method: [", "\x00", "- a\n- b", ""])
def test_files_that_are_no_recipes(tmp_path, text):
    with pytest.raises(ConfigError):
        MergeConfig.from_yaml(write(tmp_path, text))


@pytest.mark.parametrize(
    ("given", "message"),
    [("merge_method: ties\nmodels: []", "got its text; use MergeConfig.from_dict"), (None, "got NoneType")],
)
def test_what_is_no_path_of_a_recipe(given, message):
    with pytest.raises(ConfigError, match=message):
        MergeConfig.from_yaml(given)


def test_a_missing_recipe(tmp_path):
    with pytest.raises(ConfigError, match="cannot read the recipe"):
        MergeConfig.from_yaml(tmp_path / "none.yaml")


@pytest.mark.parametrize("parameters", ["{weight: 1, weight: 2}", "&p {weight: *p}", "{density: " + "[" * 5000])
def test_yaml_out_of_bounds(tmp_path, parameters):
    with pytest.raises(ConfigError, match="not valid YAML: line") as error:
        MergeConfig.from_yaml(write(tmp_path, f"merge_method: rtsvm\nparameters: {parameters}\n"))
    assert "\n" not in str(error.value)


def test_a_recipe_that_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # which would wait for a writer
    for name, message in (("pipe", "a pipe"), (".", "a folder"), ("a\0b", "not a path"), ("n" * 300, "too long")):
        with pytest.raises(ConfigError, match=f"cannot read the recipe.*{message}"):
            MergeConfig.from_yaml(tmp_path / name)


def test_what_published_recipes_have_beside_the_merge(tmp_path):
    text = (
        "name: my-merge\nx-all: &all {weight: 5e-1}\nmerge_method: ties\nbase_model: b\ndtype: torch.bfloat16\n"
        "models: [{model: a, parameters: *all}, {model: c, parameters: {weight: {value: [1e-1, 3e-1], filter: mlp}}}]\n"
    )
    config = MergeConfig.from_yaml(write(tmp_path, text))
    assert config.dtype == "bfloat16" and config.base_model == "b"
    assert config.options(2, "layers.0.mlp", 0.5).weight == (0.5, 0.2)
    assert config.options(2, "layers.0.attn", 0.5).weight == (0.5, 1.0)


def test_yaml_cannot_run_code(tmp_path):
    with pytest.raises(ConfigError, match="not valid YAML"):
        MergeConfig.from_yaml(write(tmp_path, "merge_method: !!python/object/apply:os.system ['true']"))


@pytest.mark.parametrize("key", ["include", "exclude"])
@pytest.mark.parametrize(
    ("pattern", "similar"), [("lm_head", r"'lm_head.weight', or '\*lm_head\*'\?"), ("*lmhead*", r"'lm_head.weight'\?")]
)
def test_a_pattern_that_no_tensor_has(key, pattern, similar):
    base = {name: torch.zeros(2, 2) for name in ("model.layers.0.weight", "lm_head.weight")}
    config = MergeConfig(merge_method="linear", **{key: ("*layers*", pattern)})
    with pytest.raises(ConfigError, match=f"{key}: .* matches no tensor.*Did you mean {similar}"):
        merge_state_dicts(base, [base], config)
    merge_state_dicts(base, [base], MergeConfig(merge_method="linear", **{key: ("*layers*", "lm_head.weight")}))


@pytest.mark.parametrize(
    ("method", "common", "own", "kept"),
    [
        ("linear", {"int8_mask": True, "normalize": True}, {"density": 0.5}, ({"normalize": True}, [])),
        ("breadcrumbs_ties", {"random_seed": 145}, {"weight": 0.4, "gamma": 0.01}, ({}, ["weight", "gamma"])),
        ("ties", {}, {"density": 0.4, "normalize": False}, ({}, ["density"])),
        ("slerp", {"t": 0.5}, {"weight": 0.5}, ({"t": 0.5}, [])),
        ("dare_ties", {"random_seed": [1, 2]}, {}, ({}, [])),
    ],
)  # fmt: skip
def test_parameters_of_other_methods_are_ignored_with_a_note(method, common, own, kept, caplog):
    recipe = {"merge_method": method, "models": [{"model": "a", "parameters": own}], "parameters": common}
    config = MergeConfig.from_dict(recipe)
    assert (config.parameters, list(config.models[0].parameters)) == kept
    for key in (common.keys() | own.keys()) - {*kept[0], *kept[1]}:
        assert f"{key} is ignored" in caplog.text
    assert ("set `seed`" in caplog.text) == (method == "dare_ties")
    with pytest.raises(ConfigError, match=r"unknown key"):  # not mergekit's
        MergeConfig.from_dict(recipe | {"parameters": {"rank_roh": 1}})
