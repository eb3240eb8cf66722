"""Tensors that are copied: the system copies their bytes, and where it cannot, the merge does."""

import errno
import os

import pytest
import torch
from checkpoints import save
from safetensors.torch import load_file

from r_tsvm_kernels import DiskFullError, InputChangedError, MergeConfig, merge_checkpoints, verify_output
from r_tsvm_kernels.engine import scheduling

SHAPES = {"layers.0.w": (300, 20), "layers.1.w": (300, 20), "embed": (7, 3), "norm": (9,), "scale": ()}


@pytest.fixture
def models(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: {key: torch.randn(shape, generator=generator).to(torch.bfloat16) for key, shape in SHAPES.items()}
        | {"ids": torch.arange(5), "nothing": torch.empty(0, 4)}
        for name in "ab"
    }
    return {name: save(tmp_path / name, own, 1 + (name == "b")) for name, own in tensors.items()}, tensors


def copy(path, **fields):
    return MergeConfig("passthrough", models=[path], **fields)


@pytest.fixture(params=["whole", "tiles"])
def tiles(request, monkeypatch):
    if request.param == "tiles":
        monkeypatch.setattr(scheduling, "TILE_ELEMENTS", (200, 100))


@pytest.mark.skipif(not hasattr(os, "copy_file_range"), reason="the system has no copy_file_range")
def test_the_system_copies(models, tmp_path, monkeypatch, tiles):
    paths, tensors = models
    seen, real = [], os.copy_file_range

    def counted(source, target, count, *places):
        seen.append(count)
        return real(source, target, min(count, 1000), *places)  # a part at a time

    monkeypatch.setattr(os, "copy_file_range", counted)
    out = merge_checkpoints(copy(paths["b"]), tmp_path / "out").path
    got = load_file(out / "model.safetensors")
    assert all(torch.equal(got[name], tensor) for name, tensor in tensors["b"].items())
    assert verify_output(out, inputs=True).ok and seen
    # Values of another dtype are not copied.
    seen.clear()
    merge_checkpoints(copy(paths["b"], dtype="float32", exclude=["ids"]), tmp_path / "wide")
    assert sum(seen) < 100


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, 0], ids=str)
def test_the_merge_copies_where_the_system_cannot(models, tmp_path, monkeypatch, tiles, number):
    paths, _ = models
    want = merge_checkpoints(copy(paths["b"]), tmp_path / "want").path / "model.safetensors"

    def refuse(*arguments):
        if number:
            raise OSError(number, os.strerror(number))
        return 0

    monkeypatch.setattr(os, "copy_file_range", refuse, raising=False)
    out = merge_checkpoints(copy(paths["b"]), tmp_path / "out").path
    assert (out / "model.safetensors").read_bytes() == want.read_bytes() and verify_output(out, inputs=True).ok
    monkeypatch.delattr(os, "copy_file_range")
    out = merge_checkpoints(copy(paths["b"]), tmp_path / "without").path
    assert (out / "model.safetensors").read_bytes() == want.read_bytes()


def test_a_full_disk_is_an_error(models, tmp_path, monkeypatch):
    paths, _ = models

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "copy_file_range", full, raising=False)
    with pytest.raises(DiskFullError):
        merge_checkpoints(copy(paths["a"]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not hasattr(os, "copy_file_range"), reason="the system has no copy_file_range")
def test_an_input_that_changes_is_an_error(models, tmp_path, monkeypatch):
    paths, _ = models
    real = os.copy_file_range

    def changed(*arguments):
        with (paths["a"] / "model.safetensors").open("r+b") as file:
            file.seek(-4, os.SEEK_END)
            file.write(b"abcd")
        return real(*arguments)

    monkeypatch.setattr(os, "copy_file_range", changed)
    with pytest.raises(InputChangedError):
        merge_checkpoints(copy(paths["a"]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_excluded_tensors_are_copied_too(models, tmp_path):
    paths, tensors = models
    config = MergeConfig("linear", base_model=paths["a"], models=[paths["b"]], exclude=["*layers.1*"])
    got = load_file(merge_checkpoints(config, tmp_path / "out").path / "model.safetensors")
    assert torch.equal(got["layers.1.w"], tensors["a"]["layers.1.w"])
    assert not torch.equal(got["layers.0.w"], tensors["a"]["layers.0.w"])
    assert verify_output(tmp_path / "out", inputs=True).ok
