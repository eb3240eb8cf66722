"""Pickled checkpoints: refused unless allowed, and then only tensors are read."""

import json
import os
import pickle
import zipfile

import pytest
import torch
from checkpoints import state_dict
from compare import same_bits
from safetensors.torch import save_file

from r_tsvm_kernels import CheckpointError, InputChangedError, PickleRefusedError
from r_tsvm_kernels.checkpoint import Checkpoint


def save_pickled(folder, tensors, shards=1):
    folder.mkdir()
    if shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return folder
    weight_map = {}
    for i in range(shards):
        part = dict(list(tensors.items())[i::shards])
        file = f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin"
        torch.save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("shards", [1, 2])
def test_refused_unless_allowed(tmp_path, shards):
    folder = save_pickled(tmp_path / "m", state_dict(0), shards)
    for path in (folder, min(folder.glob("*.bin"))):
        with pytest.raises(PickleRefusedError, match=r"Convert it to safetensors.*--allow-pickle"):
            Checkpoint(path)


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_reads_what_was_saved(tmp_path, shards):
    tensors = state_dict(3, torch.bfloat16) | {"transposed": torch.randn(4, 6).mT}
    checkpoint = Checkpoint(save_pickled(tmp_path / "m", tensors, shards), allow_pickle=True)
    assert checkpoint.stem == "model"
    assert checkpoint.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        header = checkpoint.tensors[name]
        assert (header.dtype, header.shape, header.nbytes) == (tensor.dtype, tuple(tensor.shape), tensor.nbytes)
        loaded = checkpoint.load(name)
        assert same_bits(loaded, tensor) and loaded.is_contiguous()
        if tensor.ndim and len(tensor) > 2:
            assert same_bits(checkpoint.load(name, rows=(1, 3)), tensor[1:3])


def test_loading_leaves_the_file_alone(tmp_path):
    checkpoint = Checkpoint(save_pickled(tmp_path / "m", {"a": torch.ones(3)}), allow_pickle=True)
    checkpoint.load("a").zero_()
    assert same_bits(checkpoint.load("a"), torch.ones(3))


def test_travels_without_its_values(tmp_path):
    tensors = {"a": torch.randn(100_000)}
    checkpoint = Checkpoint(save_pickled(tmp_path / "m", tensors), allow_pickle=True)
    sent = pickle.dumps(checkpoint)
    assert len(sent) < 10_000
    assert same_bits(pickle.loads(sent).load("a"), tensors["a"])
    torch.save({"a": torch.zeros(100_000)}, tmp_path / "m" / "pytorch_model.bin")
    with pytest.raises(InputChangedError, match="pytorch_model"):
        pickle.loads(sent).load("a")


def test_safetensors_go_first(tmp_path):
    folder = save_pickled(tmp_path / "m", {"pickled": torch.ones(2)})
    save_file({"safe": torch.ones(2)}, folder / "model.safetensors")
    assert list(Checkpoint(folder, allow_pickle=True).tensors) == ["safe"]


def test_what_training_leaves_is_no_model(tmp_path):
    folder = tmp_path / "m"
    folder.mkdir()
    torch.save({"a": torch.ones(2)}, folder / "weights.pt")
    for name in ("training_args.bin", "optimizer.pt", "rng_state_0.pth"):
        torch.save({"b": torch.ones(2)}, folder / name)
    assert list(Checkpoint(folder, allow_pickle=True).tensors) == ["a"]
    torch.save({"b": torch.ones(2)}, folder / "other.pt")
    with pytest.raises(CheckpointError, match=r"2 \.pt files and no index"):
        Checkpoint(folder, allow_pickle=True)


def test_adapters_are_refused(tmp_path):
    (tmp_path / "m").mkdir()
    torch.save({"a": torch.ones(2)}, tmp_path / "m" / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="LoRA adapter"):
        Checkpoint(tmp_path / "m", allow_pickle=True)


class Attack:
    """Runs code when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_code_is_not_run(tmp_path):
    folder = save_pickled(tmp_path / "m", {"a": torch.ones(2), "b": Attack(tmp_path / "owned")})
    with pytest.raises(PickleRefusedError, match="holds more than tensors, whose code is not run"):
        Checkpoint(folder, allow_pickle=True)
    assert not (tmp_path / "owned").exists()


@pytest.mark.filterwarnings("ignore:Validating sparse tensor:UserWarning")  # torch, from 2.14 on
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(2)], "expected a dict from names to tensors, got list"),
        ({"state_dict": {"a": torch.ones(2)}}, "'state_dict': dict; save the state_dict alone"),
        ({1: torch.ones(2)}, "expected a dict"),
        ({"a\n": torch.ones(2)}, "not a valid tensor name"),
        ({"a": torch.ones(1).expand(10**9)}, "a would take 4000000000 bytes"),
        ({"a": torch.eye(3).to_sparse()}, "cannot be merged"),
        ({}, "no tensors"),
    ],
    ids=["list", "nested", "number", "name", "expanded", "sparse", "empty"],
)
def test_what_is_no_model(tmp_path, content, message):
    folder = save_pickled(tmp_path / "m", content)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(folder, allow_pickle=True)


def test_damaged_files(tmp_path):
    good = (save_pickled(tmp_path / "m", state_dict(0)) / "pytorch_model.bin").read_bytes()
    file = tmp_path / "bad.bin"
    for bad in (b"", b"PK", good[:-1], good[:500], b"x" * 1000):
        file.write_bytes(bad)
        with pytest.raises(CheckpointError, match=r"bad\.bin: truncated, or not a file of torch\.save"):
            Checkpoint(file, allow_pickle=True)
    file.write_bytes(good[500:])
    # Python 3.14 notices that the archive lacks its beginning, others leave that to torch.
    with pytest.raises(CheckpointError, match=r"bad\.bin: (not a readable pickle|truncated)"):
        Checkpoint(file, allow_pickle=True)
    torch.save({"a": torch.ones(2)}, file, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"since version 1\.6"):
        Checkpoint(file, allow_pickle=True)


def test_what_torch_says_of_a_damaged_file_is_printable(tmp_path, monkeypatch):
    folder = save_pickled(tmp_path / "m", state_dict(0))

    def fail(*arguments, **options):
        raise ValueError("Unknown endianness type: \0\x1b[2J")  # torch 2.6 quotes what it read

    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(CheckpointError, match=r"not a readable pickle of tensors \(ValueError: .*") as error:
        Checkpoint(folder, allow_pickle=True)
    assert str(error.value).isprintable()


def test_compressed_files_are_refused(tmp_path):
    file = tmp_path / "a.bin"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 10**6)
    with pytest.raises(CheckpointError, match="compressed"):
        Checkpoint(file, allow_pickle=True)


def test_a_pickle_that_changes_is_not_touched(tmp_path):
    folder = save_pickled(tmp_path / "m", {"a": torch.ones(100_000)})
    checkpoint = Checkpoint(folder, allow_pickle=True)
    os.truncate(folder / "pytorch_model.bin", 100)
    for check in (checkpoint.check_unchanged, lambda: checkpoint.load("a")):
        with pytest.raises(InputChangedError, match=r"pytorch_model\.bin"):
            check()
