"""Modules that a merge from parts cannot be written to are refused, before anything is changed."""

import pytest
import torch
from checkpoints import save
from test_parts_in_memory import Small, Tied, folders  # noqa: F401
from torch import nn

from r_tsvm_kernels import (
    CheckpointError,
    ConfigError,
    ConvergenceError,
    DeviceError,
    DTypeError,
    MergeConfig,
    NonFiniteError,
    Parts,
    decompose_checkpoints,
)


def state(module):
    return {name: x.clone() for name, x in module.state_dict().items()}


def on_meta(module):
    return module.to("meta")


def expanded(module):
    module.up.bias = nn.Parameter(torch.ones(1).expand(40))
    return module


def with_dtype(dtype):
    def change(module):
        module.up.weight = nn.Parameter(module.up.weight.detach().to(dtype), requires_grad=False)
        return module

    return change


def other_integers(module):
    module.steps = torch.tensor(3, dtype=torch.int8)
    return module


def copying(module):
    def copies(module, state, prefix, metadata):
        for name in list(state):
            state[name] = state[name].detach().clone()

    module.register_state_dict_post_hook(copies)
    return module


def wrapped(module):
    outer = nn.Module()
    outer.inner = module
    return outer


@pytest.mark.parametrize(
    "change, error, words",
    [
        (on_meta, DeviceError, r"of the module: is on the meta device.*to_empty"),
        (expanded, DTypeError, r"up.bias of the module: is expanded.*clone"),
        (with_dtype(torch.int8), DTypeError, r"up.weight.*int8, which cannot hold the float32.*not quantised"),
        (with_dtype(torch.complex64), DTypeError, r"up.weight.*complex64"),
        (with_dtype(torch.float8_e4m3fn), DTypeError, r"up.weight.*float8_e4m3fn"),
        (other_integers, DTypeError, r"steps.*int8, which cannot hold the int64"),
        (copying, CheckpointError, r"state_dict gives a copy.*load_state_dict"),
        (wrapped, CheckpointError, r"has no steps, embed.weight.*give the module that it has as inner"),
        (lambda module: dict(module.state_dict()), ConfigError, r"expected a torch.nn.Module, got dict"),
        (lambda module: None, ConfigError, r"expected a torch.nn.Module, got NoneType"),
    ],
)
def test_what_cannot_be_written_to(folders, change, error, words):  # noqa: F811
    parts, module = Parts.load(folders[1]), change(Small())
    before = state(module) if isinstance(module, nn.Module) else {}
    for call in (lambda: parts.apply_(module, {"task0": 0.5}), lambda: parts.restore_(module)):
        with pytest.raises(error, match=words):
            call()
    for name, x in before.items():
        assert x.device.type == "meta" or torch.equal(x, module.state_dict()[name])


def test_memory_in_another_order(folders):  # noqa: F811
    parts, module = Parts.load(folders[1]), Small()
    module.up.weight.data = module.up.weight.data.T.contiguous().T
    parts.apply_(module, {"task0": 0.5})
    assert not module.up.weight.is_contiguous()
    assert torch.equal(module.up.weight, parts.state_dict({"task0": 0.5})["up.weight"])


def tied_pair(tmp_path, *, same):
    """Parts of a base that stores a head and an embedding, both with the same values in all models or not."""
    paths = []
    for name in ("base", "a", "b"):
        module = Tied(tie=same)
        paths.append(save(tmp_path / name, {key: x.clone() for key, x in module.state_dict().items()}))
    decompose_checkpoints(MergeConfig("tsvm", base_model=paths[0], models=paths[1:]), tmp_path / "parts")
    return Parts.load(tmp_path / "parts")


def test_ties_that_the_base_does_not_have(tmp_path):
    parts, module = tied_pair(tmp_path, same=False), Tied()
    before = state(module)
    for call in (parts.apply_, parts.restore_):
        with pytest.raises(CheckpointError, match=r"the module ties model.embed_tokens.weight to lm_head.weight"):
            call(module)
    assert all(torch.equal(x, before[name]) for name, x in module.state_dict().items())
    parts.apply_(Tied(tie=False))


def test_ties_of_values_that_are_the_same(tmp_path):
    parts, module = tied_pair(tmp_path, same=True), Tied()
    parts.apply_(module, {"a": 0.5})
    assert torch.equal(module.lm_head.weight, parts.state_dict({"a": 0.5})["lm_head.weight"])
    with pytest.raises(CheckpointError, match="the module ties"):
        parts.apply_(module, {"a": [{"filter": "lm_head", "value": 1.0}, {"value": 0.5}]})


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_that_the_base_does_not_store(tmp_path, tied):
    paths = []
    for name in ("base", "a", "b"):
        tensors = {"model.embed_tokens.weight": torch.randn(50, 16)}
        paths.append(save(tmp_path / name, tensors, config={"tie_word_embeddings": tied}))
    decompose_checkpoints(MergeConfig("tsvm", base_model=paths[0], models=paths[1:]), tmp_path / "parts")
    parts, module = Parts.load(tmp_path / "parts"), Tied(tie=False)
    before = state(module)
    if tied:
        with pytest.raises(CheckpointError, match=r"lm_head\.weight in memory of its own.*tie_weights"):
            parts.apply_(module)
        assert all(torch.equal(x, before[name]) for name, x in module.state_dict().items())
        parts.apply_(Tied())
    else:
        parts.apply_(module)
        assert torch.equal(module.lm_head.weight, before["lm_head.weight"])


def test_another_base_is_refused(folders, tmp_path):  # noqa: F811
    other = save(tmp_path / "other", Small().state_dict())
    parts, module = Parts.load(folders[1], base=other), Small()
    for call in (parts.state_dict, lambda: parts.apply_(module), lambda: parts.restore_(module)):
        with pytest.raises(CheckpointError, match=r"other: .* is not the tensor that .*parts was made for"):
            call()


def test_weights_that_cancel_change_nothing(tmp_path):
    base = torch.randn(40, 16)
    change = 0.01 * torch.randn(40, 16)
    paths = [save(tmp_path / "base", {"weight": base, "bias": torch.randn(40)})]
    for number in range(2):
        paths.append(save(tmp_path / f"t{number}", {"weight": base + change, "bias": torch.randn(40)}))
    decompose_checkpoints(MergeConfig("tsvm", base_model=paths[0], models=paths[1:]), tmp_path / "parts")
    parts, module = Parts.load(tmp_path / "parts"), nn.Linear(16, 40)
    before = state(module)
    with pytest.raises(ConvergenceError, match="cancel each other"):
        parts.apply_(module, [1.0, -1.0])
    assert all(torch.equal(x, before[name]) for name, x in module.state_dict().items())


def test_after_an_overflow_the_base_can_be_restored(folders):  # noqa: F811
    parts, module = Parts.load(folders[1]), Small(torch.float16)
    with pytest.raises(NonFiniteError, match="does not fit float16"):
        parts.apply_(module, {"task0": 1e7})
    parts.restore_(module)
    assert all(torch.equal(x, folders[0].state_dict()[name].to(x.dtype)) for name, x in module.state_dict().items())


@pytest.mark.parametrize("rank", [0, -1, 1.5, "x"])
def test_ranks_that_are_none(folders, rank):  # noqa: F811
    with pytest.raises(ConfigError, match="parts_rank"):
        Parts.load(folders[1], rank=rank)


@pytest.mark.parametrize("device", ["meta", "nothing", "cuda:99"])
def test_devices_that_are_none(folders, device):  # noqa: F811
    parts = Parts.load(folders[1])
    for call in (lambda: parts.state_dict(device=device), lambda: parts.apply_(Small(), device=device)):
        with pytest.raises(DeviceError, match="device"):
            call()
