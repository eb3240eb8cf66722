"""ShardFile: any order, any thread, row tiles, resuming, and what it refuses."""

import errno
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from checkpoints import state_dict
from compare import same_bits
from safetensors import safe_open
from safetensors.torch import load_file

from r_tsvm_kernels import CheckpointError
from r_tsvm_kernels.checkpoint import ShardFile, ShardLayout, TensorSpec, checksum
from r_tsvm_kernels.system import SHARED_BLOCK


def layout_of(tensors, file_name="a.safetensors"):
    return ShardLayout(file_name, {name: TensorSpec(t.dtype, tuple(t.shape)) for name, t in tensors.items()})


TENSORS = state_dict(1, torch.bfloat16) | {
    "wide": torch.randn(300, 70, dtype=torch.float64),
    "transposed": torch.randn(4, 6).mT,
    "complex": torch.randn(3, dtype=torch.complex64),
    "float8": torch.randn(5).to(torch.float8_e4m3fn),
    'quote"é': torch.ones(1),
}


def test_any_order_and_the_library_reads_it_back(tmp_path):
    layout = layout_of(TENSORS)
    path = tmp_path / layout.file_name
    with ShardFile.create(path, layout) as shard:
        assert path.stat().st_size == layout.size
        for name in sorted(TENSORS, reverse=True):
            shard.write(name, TENSORS[name])
        shard.sync()
        assert {n: shard.read_checksum(n) for n in TENSORS} == {n: checksum(t) for n, t in TENSORS.items()}
    loaded = load_file(path)
    assert loaded.keys() == TENSORS.keys()
    assert all(same_bits(loaded[name], tensor) for name, tensor in TENSORS.items())
    with safe_open(path, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}


@pytest.mark.parametrize("begin", [0, 8, 4088, 4096, 123456])
def test_the_first_tensor_begins_where_it_is_asked_to(tmp_path, begin):
    specs = {name: TensorSpec(t.dtype, tuple(t.shape)) for name, t in TENSORS.items()}
    layout = ShardLayout("a.safetensors", specs, begin=begin)
    assert (layout.offsets[next(iter(specs))] - begin) % SHARED_BLOCK == 0
    with ShardFile.create(tmp_path / "a", layout) as shard:
        for name, tensor in TENSORS.items():
            shard.write(name, tensor)
    loaded = load_file(tmp_path / "a")
    assert all(same_bits(loaded[name], tensor) for name, tensor in TENSORS.items())


def test_threads_and_row_tiles_write_the_same_bytes(tmp_path):
    layout = layout_of(TENSORS)
    with ShardFile.create(tmp_path / "whole", layout) as whole, ShardFile.create(tmp_path / "tiles", layout) as tiles:
        jobs = []
        for name, tensor in TENSORS.items():
            whole.write(name, tensor)
            if tensor.ndim:
                jobs += [(name, tensor[row : row + 3], row) for row in range(0, len(tensor), 3)]
            else:
                jobs.append((name, tensor, None))
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda job: tiles.write(*job), reversed(jobs)))
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "tiles").read_bytes()


def test_resuming_keeps_what_was_written(tmp_path):
    tensors = {"a": torch.arange(4), "b": torch.ones(3)}
    layout = layout_of(tensors)
    with ShardFile.create(tmp_path / "s", layout) as shard:
        shard.write("b", tensors["b"])
    with ShardFile.open(tmp_path / "s", layout) as shard:
        assert shard.read_checksum("b") == checksum(tensors["b"])
        shard.write("a", tensors["a"])
    assert all(same_bits(tensor, tensors[name]) for name, tensor in load_file(tmp_path / "s").items())


def test_resuming_another_shard_is_refused(tmp_path):
    layout = layout_of({"a": torch.ones(4)})
    ShardFile.create(tmp_path / "s", layout).close()
    with pytest.raises(CheckpointError, match="not the shard that was started"):
        ShardFile.open(tmp_path / "s", layout_of({"b": torch.ones(4)}))
    (tmp_path / "s").write_bytes((tmp_path / "s").read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="not the shard that was started"):
        ShardFile.open(tmp_path / "s", layout)
    with pytest.raises(CheckpointError, match="No such file"):
        ShardFile.open(tmp_path / "gone", layout)


@pytest.mark.parametrize(
    ("name", "tensor", "first_row"),
    [
        ("b", torch.ones(4, 2), None),
        ("a", torch.ones(3, 2), None),
        ("a", torch.ones(4, 3), 0),
        ("a", torch.ones(4, 2).half(), None),
        ("a", torch.ones(2, 2), 3),
        ("a", torch.ones(2, 2), -1),
        ("a", torch.ones(8), 0),
        ("scalar", torch.tensor(1.0), 0),
    ],
)
def test_only_what_was_announced_is_written(tmp_path, name, tensor, first_row):
    layout = layout_of({"a": torch.ones(4, 2), "scalar": torch.tensor(0.0)})
    with ShardFile.create(tmp_path / "s", layout) as shard:
        before = (tmp_path / "s").read_bytes()
        with pytest.raises(CheckpointError, match="expected"):
            shard.write(name, tensor, first_row)
    assert (tmp_path / "s").read_bytes() == before


def test_an_existing_file_is_not_overwritten(tmp_path):
    (tmp_path / "s").write_text("precious")
    with pytest.raises(CheckpointError, match="s: cannot be written"):
        ShardFile.create(tmp_path / "s", layout_of({}))
    assert (tmp_path / "s").read_text() == "precious"


def test_the_system_may_write_less_than_it_was_asked_for(tmp_path, monkeypatch):
    tensors = {"a": torch.arange(1000)}
    pwrite, preadv = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda file, data, offset: pwrite(file, data[:7], offset))
    with ShardFile.create(tmp_path / "s", layout_of(tensors)) as shard:
        shard.write("a", tensors["a"])
        monkeypatch.setattr(os, "preadv", lambda file, buffers, offset: preadv(file, [buffers[0][:7]], offset))
        assert shard.read_checksum("a") == checksum(tensors["a"])
    assert same_bits(load_file(tmp_path / "s")["a"], tensors["a"])


def test_write_errors_name_the_file(tmp_path, monkeypatch):
    def broken(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    tensors = {"a": torch.arange(1000)}
    with ShardFile.create(tmp_path / "s", layout_of(tensors)) as shard:
        for function, action in [
            ("pwrite", lambda: shard.write("a", tensors["a"])),
            ("preadv", lambda: shard.read_checksum("a")),
            ("fdatasync", shard.sync),
        ]:
            monkeypatch.setattr(os, function, broken)
            with pytest.raises(CheckpointError, match="s: cannot be written or read back: Input/output error"):
                action()


def test_a_shard_that_was_cut_short_has_no_checksum(tmp_path):
    layout = layout_of({"a": torch.arange(1000)})
    with ShardFile.create(tmp_path / "s", layout) as shard:
        os.truncate(tmp_path / "s", layout.size - 1)
        with pytest.raises(CheckpointError, match="s: the file has become shorter"):
            shard.read_checksum("a")


def test_file_systems_that_cannot_reserve(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    layout = layout_of({"a": torch.arange(1000)})
    ShardFile.create(tmp_path / "s", layout).close()
    assert (tmp_path / "s").stat().st_size == layout.size
