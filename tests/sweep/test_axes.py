"""What a sweep varies: the syntax of grids and ranges, and the recipes of candidates."""

import pytest

from r_tsvm_kernels import ConfigError, MergeConfig
from r_tsvm_kernels.sweep.axes import Range, check_axes, grid_axis, range_axis, with_values

CONFIG = MergeConfig("ties", base_model="org/base", models=["org/math@main", {"model": "./x/code", "parameters":
                     {"weight": 0.3}}, "./y/coder.safetensors"], parameters={"lambda": 0.9})  # fmt: skip


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("0.4:1.6:0.2", (0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6)),
        ("0:1:0.1", (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)),
        ("1:0.4:-0.3", (1.0, 0.7, 0.4)),
        ("0.1:0.45:.1", (0.1, 0.2, 0.3, 0.4)),
        (" 1e-3 : 3e-3 : 1E-3", (0.001, 0.002, 0.003)),
        ("2:2:1", (2,)),
        ("0.5,1", (0.5, 1)),
        ("1e-3, 2", (0.001, 2)),
        ("[0, 1],[1, 0.5]", ([0, 1], [1, 0.5])),
        ("{filter: mlp, value: 0.5},1", ({"filter": "mlp", "value": 0.5}, 1)),
    ],
)
def test_values(text, values):
    found = grid_axis(CONFIG, "alpha", text).values
    assert found == values and list(map(type, found)) == list(map(type, values))


def test_values_of_any_kind():
    assert grid_axis(MergeConfig("rtsvm"), "rank", "full,sparsity").values == ("full", "sparsity")
    assert grid_axis(CONFIG, "normalize", "true,false").values == (True, False)
    assert grid_axis(CONFIG, "alpha", [0.5, 1]).values == (0.5, 1)
    whole = grid_axis(MergeConfig("karcher", models=["a", "b"]), "max_iter", "10:30:10").values
    assert whole == (10, 20, 30) and {type(value) for value in whole} == {int}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no values"),
        ("1:2", "START:STOP:STEP, got '1:2'"),
        ("1:2:3:4", "START:STOP:STEP"),
        ("1:2:0", "never reaches its end"),
        ("2:1:0.5", "never reaches its end"),
        ("0:1:1e-9", "more than 10000 values"),
        ("0:1e99:1e-99", "more than 10000 values"),
        ("1,,2", "not a list of values"),
        ("1]", "not a list of values"),
        ("1,null", "expected a value, got nothing"),
        ("1,2,1.0", "1.0 is given twice"),
        ("0.5,high", "should be a number, got 'high'"),
        (".inf", "finite"),
    ],
)
def test_what_is_no_list_of_values(text, message):
    with pytest.raises(ConfigError, match="alpha") as caught:
        grid_axis(CONFIG, "alpha", text)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "label", "model"),
    [
        ("weight", "weight", None),
        ("weight.math@main", "weight.math@main", 0),
        ("weight.ma", "weight.math@main", 0),
        ("weight.org/math@main", "weight.math@main", 0),
        ("density.code", "density.code", 1),
        ("density.coder", "density.coder", 2),
        ("lambda", "lambda", None),
    ],
)
def test_names(name, label, model):
    axis = grid_axis(CONFIG, name, "0.5,1")
    assert (axis.label, axis.model) == (label, model)
    assert axis.parameter == {"lambda": "alpha"}.get(label, label.partition(".")[0])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("alphha", "alphha: unknown parameter; did you mean 'alpha'?"),
        ("dtype", "dtype: is a recipe field, not a parameter; "),
        ("alpha.math", "alpha is one value for all models; write alpha=..."),
        ("weight.mth@main", "no model 'mth@main'; did you mean 'math@main'?"),
        ("weight.co", "several models begin so: code, coder"),
        ("weight.zzz", "no model 'zzz'; models: math@main, code, coder"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(ConfigError) as caught:
        grid_axis(CONFIG, name, "0.5,1")
    assert message in str(caught.value)


def test_models_of_one_name_are_told_apart_as_tasks_are():
    config = MergeConfig("ties", base_model="b", models=["x/expert", "y/expert"])
    assert [grid_axis(config, f"weight.{name}", "1").model for name in ("expert", "expert-2", "y/expert")] == [0, 1, 1]
    assert grid_axis(config, "weight.y/expert", "0.5").label == "weight.expert-2"


def test_a_parameter_is_varied_once():
    twice = [grid_axis(CONFIG, "alpha", "1"), grid_axis(CONFIG, "lambda", "2")]
    with pytest.raises(ConfigError, match="alpha and lambda: given twice"):
        check_axes(twice)
    with pytest.raises(ConfigError, match="alpha: given twice"):
        check_axes([twice[0], grid_axis(CONFIG, "alpha", "2")])
    check_axes([grid_axis(CONFIG, name, "1") for name in ("weight", "weight.math", "weight.code", "density.math")])


def test_ranges():
    assert range_axis(CONFIG, "alpha", "0.2:2").range == Range(0.2, 2.0)
    assert range_axis(CONFIG, "density.math", "0.01:1:log").range == Range(0.01, 1.0, log=True)
    assert range_axis(CONFIG, "alpha", (0.5, 2)).range == Range(0.5, 2.0)
    whole = range_axis(MergeConfig("karcher", models=["a", "b"]), "max_iter", "5:50:log").range
    assert whole == Range(5, 50, log=True, whole=True) and type(whole.low) is int


@pytest.mark.parametrize("text", ["1", "2:1", "1:1", "0:1:log", "-1:1:log", "a:b", "0:1:lin", "0:inf"])
def test_what_is_no_range(text):
    with pytest.raises(ConfigError, match="alpha"):
        range_axis(CONFIG, "alpha", text)
    with pytest.raises(ConfigError, match="whole numbers"):
        range_axis(MergeConfig("karcher", models=["a", "b"]), "max_iter", "5.5:50")
    with pytest.raises(ConfigError, match="density"):
        range_axis(CONFIG, "density", "0.5:2")  # more than 1 is refused


def test_recipes_of_candidates():
    axes = [grid_axis(CONFIG, name, "0.5,1") for name in ("weight.math", "alpha", "weight")]
    found = with_values(CONFIG, axes, {"weight.math@main": 1, "alpha": 0.5, "weight": 0.7})
    assert found.parameters == {"alpha": 0.5, "weight": 0.7}
    assert [entry.parameters for entry in found.models] == [{"weight": 1}, {}, {}]
    assert found.options(3).weight == (1.0, 0.7, 0.7) and found.options(3).alpha == 0.5
    assert CONFIG.options(3).weight == (1.0, 0.3, 1.0) and CONFIG.parameters == {"lambda": 0.9}  # as it was
    same = with_values(CONFIG, [grid_axis(CONFIG, "density.code", "0.1")], {"density.code": 0.1})
    assert same.options(3).density == (1.0, 0.1, 1.0) and same.options(3).alpha == 0.9
