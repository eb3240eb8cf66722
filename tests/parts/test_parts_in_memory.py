"""`Parts`: the merged model in memory, in place and back."""

import numpy as np
import pytest
import torch
from checkpoints import family, save
from safetensors.torch import load_file
from torch import nn

from r_tsvm_kernels import (
    CheckpointError,
    ConfigError,
    MergeConfig,
    Parts,
    ShapeError,
    decompose_checkpoints,
    merge_checkpoints,
)


class Small(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.up = nn.Linear(16, 40)
        self.head = nn.Linear(40, 16, bias=False)
        self.register_buffer("steps", torch.tensor(3))
        self.to(dtype)


@pytest.fixture
def folders(tmp_path):
    """Write base, three fine-tunes and their parts; return the base, as a module, and the folder of parts."""
    base = Small()
    paths = [save(tmp_path / "base", base.state_dict())]
    for t in range(3):
        tuned = {
            n: x + 0.05 * torch.randn_like(x) if x.is_floating_point() else x for n, x in base.state_dict().items()
        }
        paths.append(save(tmp_path / f"task{t}", tuned))
    recipe = MergeConfig("tsvm", base_model=paths[0], models=paths[1:], alpha=0.9)
    decompose_checkpoints(recipe, tmp_path / "parts")
    return base, tmp_path / "parts"


def test_a_state_dict_has_the_bytes_of_the_merge(folders, tmp_path):
    parts = Parts.load(folders[1])
    assert parts.tasks == ("task0", "task1", "task2")
    for number, (weights, alpha) in enumerate([(None, None), ({"task1": -0.5}, 1.2), ([1.0, 0.0, 2.0], [0.5, 1.0])]):
        merge_checkpoints(parts.recipe(weights, alpha), tmp_path / f"out{number}")
        expected = load_file(tmp_path / f"out{number}" / "model.safetensors")
        found = parts.state_dict(weights, alpha)
        assert found.keys() == expected.keys() and all(torch.equal(found[n], x) for n, x in expected.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_module_goes_there_and_back_without_drift(folders, dtype):
    parts, module = Parts.load(folders[1]), Small(dtype)
    start = {name: x.to(dtype) if x.is_floating_point() else x for name, x in folders[0].state_dict().items()}
    pointers = {name: x.data_ptr() for name, x in module.state_dict().items()}
    seen = []
    for _ in range(3):
        for weights in ({"task0": 1.0}, {"task0": -1.0, "task2": 0.3}):
            parts.apply_(module, weights)
            seen.append({name: x.clone() for name, x in module.state_dict().items()})
        parts.restore_(module)
        assert all(torch.equal(x, start[name]) for name, x in module.state_dict().items())
    assert all(torch.equal(seen[0][name], x) and torch.equal(seen[2][name], x) for name, x in seen[4].items())
    assert not torch.equal(seen[0]["up.weight"], seen[1]["up.weight"])
    assert {name: x.data_ptr() for name, x in module.state_dict().items()} == pointers
    parts.apply_(module)
    expected = parts.state_dict()
    for name, x in module.state_dict().items():
        assert torch.equal(x, expected[name].to(x.dtype))


def test_gradients_are_left_alone(folders):
    parts, module = Parts.load(folders[1]), folders[0]
    module.up.weight.grad = torch.ones(40, 16)
    parts.apply_(module)
    assert module.up.weight.requires_grad and module.up.weight.is_leaf
    assert torch.equal(module.up.weight.grad, torch.ones(40, 16))


def test_a_lower_rank(folders):
    whole, cut = Parts.load(folders[1]), Parts.load(folders[1], rank=2)
    update = cut.state_dict({"task0": 1, "task1": 0, "task2": 0})["up.weight"] - folders[0].up.weight.detach()
    assert torch.linalg.matrix_rank(update.double(), rtol=1e-5) == 2
    assert torch.linalg.matrix_rank((whole.state_dict()["up.weight"] - folders[0].up.weight).double(), rtol=1e-5) > 2


def test_another_place_of_the_base(folders, tmp_path):
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match=r"base: no such folder.*--base \(base=\)"):
        Parts.load(folders[1])
    assert Parts.load(folders[1], base=tmp_path / "moved").state_dict().keys() == folders[0].state_dict().keys()


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda parts: parts.recipe({"maths": 1.0}), ConfigError, "maths"),
        (lambda parts: parts.recipe([1.0]), ConfigError, "one for each of task0, task1, task2"),
        (lambda parts: parts.recipe(0.5), ConfigError, "one for each of task0, task1, task2"),
        (lambda parts: parts.recipe("0.5"), ConfigError, "one for each of task0, task1, task2"),
        (lambda parts: parts.recipe({"task0": "x"}), ConfigError, "number"),
        (lambda parts: parts.recipe(alpha=float("nan")), ConfigError, "finite"),
        (lambda parts: parts.apply_(nn.Linear(16, 40)), CheckpointError, "embed.weight"),
        (lambda parts: parts.apply_(other_shapes()), ShapeError, "head.weight"),
    ],
)
def test_what_is_refused(folders, call, error, words):
    with pytest.raises(error, match=words):
        call(Parts.load(folders[1]))


def other_shapes():
    module = Small()
    module.head = nn.Linear(20, 16, bias=False)
    return module


def test_no_folder_of_parts(tmp_path):
    family(tmp_path / "in")
    with pytest.raises(CheckpointError, match=r"parts.json.*rtsvm decompose"):
        Parts.load(tmp_path / "in")


@pytest.mark.parametrize(
    "weights",
    [
        np.array([0.5, 1.0, -2.0]),
        torch.tensor([0.5, 1.0, -2.0]),
        {"task0": np.float32(0.5), "task2": torch.tensor(-2.0)},
        {"task0": np.array([0.5, 0.5]), "task2": -2},
    ],
)
def test_numbers_of_numpy_and_torch(folders, weights, tmp_path):
    """As searches draw them; the recipe can be written and read again."""
    parts = Parts.load(folders[1])
    recipe = parts.recipe(weights, np.float64(0.7))
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert MergeConfig.from_yaml(tmp_path / "recipe.yaml") == recipe
    expected = parts.state_dict([0.5, 1.0, -2.0], 0.7)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in parts.state_dict(weights, 0.7).items())


class Tied(nn.Module):
    def __init__(self, tie=True):
        super().__init__()
        self.model = nn.ModuleDict({"embed_tokens": nn.Embedding(50, 16)})
        self.lm_head = nn.Linear(16, 50, bias=False)
        if tie:
            self.lm_head.weight = self.model["embed_tokens"].weight


def test_a_tied_head_that_the_base_stores_twice(tmp_path):
    paths = []
    for name in ("base", "a", "b"):
        tensors = {key: tensor.clone() for key, tensor in Tied().state_dict().items()}
        paths.append(save(tmp_path / name, tensors, config={"tie_word_embeddings": True}))
    decompose_checkpoints(MergeConfig("tsvm", base_model=paths[0], models=paths[1:]), tmp_path / "parts")
    parts, module, apart = Parts.load(tmp_path / "parts"), Tied(), Tied(tie=False)
    parts.apply_(module, {"a": 0.5})
    assert torch.equal(module.lm_head.weight, parts.state_dict({"a": 0.5})["model.embed_tokens.weight"])
    before = {key: tensor.clone() for key, tensor in apart.state_dict().items()}
    for call in (parts.apply_, parts.restore_):
        with pytest.raises(CheckpointError, match=r"lm_head\.weight in memory of its own.*tie_weights"):
            call(apart)
    assert all(torch.equal(tensor, before[key]) for key, tensor in apart.state_dict().items())
