import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from r_tsvm_kernels import ConfigError
from r_tsvm_kernels.checkpoint import ShardLayout, TensorSpec, plan_shards, shard_name, write_index
from r_tsvm_kernels.sizes import parse_size


def test_every_tensor_is_aligned_to_its_size():
    sizes = {"a": torch.uint8, "b": torch.float16, "c": torch.float32, "d": torch.float64, "e": torch.bool}
    specs = {name: TensorSpec(dtype, (3,)) for name, dtype in sizes.items()}
    (order,) = plan_shards(specs, 10**9)
    layout = ShardLayout("a", {name: specs[name] for name in order})
    assert len(layout.header) % 8 == 0
    assert all(layout.offsets[name] % spec.dtype.itemsize == 0 for name, spec in specs.items())
    assert layout.size == len(layout.header) + sum(spec.nbytes for spec in specs.values())


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
