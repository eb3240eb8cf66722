import json

import pytest
import torch
from checkpoints import state_dict
from compare import same_bits
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from r_tsvm_kernels import CheckpointError, ConfigError
from r_tsvm_kernels.checkpoint import ShardWriter, TensorSpec, parse_size, plan_shards, shard_name, write_index


def specs_of(tensors):
    return {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def write(file, tensors):
    (order,) = plan_shards(specs_of(tensors), 10**9)
    with ShardWriter(file, {name: specs_of(tensors)[name] for name in order}) as writer:
        for name in order:
            writer.write(name, tensors[name])


def test_the_library_reads_it_back(tmp_path):
    tensors = state_dict(1, torch.bfloat16) | {
        "odd": torch.arange(3, dtype=torch.uint8),
        "wide": torch.randn(3, 5, dtype=torch.float64),
        "transposed": torch.randn(4, 6).mT,
        "half": torch.randn(5).half(),
        'quote"é': torch.ones(1),
    }
    write(tmp_path / "a.safetensors", tensors)
    loaded = load_file(tmp_path / "a.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(same_bits(loaded[name], tensor) for name, tensor in tensors.items())
    with safe_open(tmp_path / "a.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_every_tensor_is_aligned_to_its_size(tmp_path):
    tensors = {
        "a": torch.ones(3, dtype=torch.uint8),
        "b": torch.ones(3).half(),
        "c": torch.ones(3),
        "d": torch.ones(1).double(),
    }
    write(tmp_path / "a.safetensors", tensors)
    raw = (tmp_path / "a.safetensors").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    assert size % 8 == 0
    header = json.loads(raw[8 : 8 + size])
    for name, tensor in tensors.items():
        assert header[name]["data_offsets"][0] % tensor.element_size() == 0


@given(st.lists(st.integers(0, 50), max_size=20), st.integers(1, 100))
def test_shards_respect_the_limit(sizes, limit):
    specs = {f"t{i}": TensorSpec(torch.uint8, (size,)) for i, size in enumerate(sizes)}
    shards = plan_shards(specs, limit)
    assert [name for shard in shards for name in shard] == list(specs)
    for shard in shards:
        assert sum(specs[name].nbytes for name in shard) <= limit or len([n for n in shard if specs[n].nbytes]) == 1


def test_names():
    assert shard_name("model", 0, 1) == "model.safetensors"
    assert shard_name("model", 2, 12) == "model-00003-of-00012.safetensors"


def test_the_order_and_form_announced_must_be_kept(tmp_path):
    specs = {"a": TensorSpec(torch.float32, (2,)), "b": TensorSpec(torch.float32, (2,))}
    for number, (name, tensor) in enumerate([("b", torch.ones(2)), ("a", torch.ones(3)), ("a", torch.ones(2).half())]):
        with (
            pytest.raises(CheckpointError, match="expected a"),
            ShardWriter(tmp_path / f"{number}.safetensors", specs) as writer,
        ):
            writer.write(name, tensor)
    with (
        pytest.raises(CheckpointError, match="1 announced tensors were not written"),
        ShardWriter(tmp_path / "short.safetensors", specs) as writer,
    ):
        writer.write("a", torch.ones(2))


def test_an_existing_file_is_not_overwritten(tmp_path):
    (tmp_path / "a.safetensors").write_text("precious")
    with pytest.raises(CheckpointError, match="cannot be written"):
        ShardWriter(tmp_path / "a.safetensors", {})
    assert (tmp_path / "a.safetensors").read_text() == "precious"


def test_index(tmp_path):
    specs = {"a": TensorSpec(torch.float32, (2,)), "b": TensorSpec(torch.bfloat16, (3,))}
    write_index(tmp_path / "i.json", specs, {"b": "y", "a": "x"})
    assert json.loads((tmp_path / "i.json").read_text()) == {
        "metadata": {"total_size": 14}, "weight_map": {"a": "x", "b": "y"},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5 * 10**9),
        ("500MB", 5 * 10**8),
        ("2GiB", 2**31),
        ("1.5kB", 1500),
        ("77", 77),
        (77, 77),
        ("1 TB", 10**12),
    ],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "-5GB", "5 apples", "GB", "1e9", "0.1"])
def test_what_is_no_size(text):
    with pytest.raises(ConfigError, match="size such as"):
        parse_size(text)
