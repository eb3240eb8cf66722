import pytest

from r_tsvm_kernels.parameters import evaluate, is_gradient, layer_positions, leaves


def test_scalars_evaluate_to_themselves():
    for value in (0.5, 3, True, "clip", ["a", "b"], []):
        assert evaluate(value, "x", 0.3) == value


@pytest.mark.parametrize(("position", "expected"), [(0.0, 1.0), (0.25, 2.0), (0.5, 3.0), (0.75, 2.0), (1.0, 1.0)])
def test_gradients_are_piecewise_linear(position, expected):
    assert evaluate([1.0, 3.0, 1.0], "x", position) == pytest.approx(expected)
    assert evaluate([4.0], "x", position) == 4.0


@pytest.mark.parametrize("position, expected", [(0.0, True), (0.49, True), (0.5, False), (0.99, False), (1.0, True)])
def test_a_gradient_of_bools_is_one_of_them(position, expected):
    assert evaluate([True, False, True], "x", position) is expected


def test_the_first_filter_that_matches_counts():
    value = [{"filter": "attn", "value": [0.0, 1.0]}, {"filter": "mlp", "value": 2}, {"value": 3}]
    assert evaluate(value, "layers.0.attn.q", 0.5) == 0.5
    assert evaluate(value, "layers.0.mlp.up", 0.5) == 2
    assert evaluate(value, "embed", 0.5) == 3
    assert evaluate(value[:2], "embed", 0.5) is None
    assert evaluate([{"filter": "*", "value": 7}], "embed", 0.5) == 7


def test_leaves_are_all_values_that_can_come_out():
    assert list(leaves([{"filter": "a", "value": [1, 2]}, {"value": "x"}])) == [1, 2, "x"]
    assert not is_gradient(["a"]) and not is_gradient([]) and is_gradient([1, 2.5])


def test_layer_positions():
    names = [
        "model.embed_tokens.weight",
        "model.layers.0.mlp.experts.7.w1",
        "model.layers.2.mlp.experts.0.w1",
        "model.layers.4.norm",
        "vision.blocks.0.w",
        "0.weight",
        "2.weight",
        "h.11.w",
        "h.0.w",
        "conv1.weight",
    ]
    assert layer_positions(names) == {
        "model.embed_tokens.weight": 0.0,
        "model.layers.0.mlp.experts.7.w1": 0.0,
        "model.layers.2.mlp.experts.0.w1": 0.5,
        "model.layers.4.norm": 1.0,
        "vision.blocks.0.w": 1.0,  # a single layer stands at the end, as in mergekit
        "0.weight": 0.0,
        "2.weight": 1.0,
        "h.11.w": 1.0,
        "h.0.w": 0.0,
        "conv1.weight": 0.0,
    }
