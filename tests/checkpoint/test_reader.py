import json

import pytest
import torch
from checkpoints import family, save, state_dict
from compare import same_bits
from safetensors.torch import save_file

from r_tsvm_kernels import CheckpointError, PickleRefused
from r_tsvm_kernels.checkpoint import Checkpoint


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_reads_what_was_saved(tmp_path, shards):
    tensors = state_dict(3, torch.bfloat16)
    checkpoint = Checkpoint(save(tmp_path / "m", tensors, shards))
    assert checkpoint.tensors.keys() == tensors.keys()
    assert checkpoint.stem == "model" and checkpoint.config["model_type"] == "toy"
    for name, tensor in tensors.items():
        header = checkpoint.tensors[name]
        assert (header.dtype, header.shape) == (tensor.dtype, tuple(tensor.shape))
        assert same_bits(checkpoint.load(name), tensor)


def test_bare_file(tmp_path):
    save_file({"a": torch.ones(3)}, tmp_path / "unet.safetensors")
    checkpoint = Checkpoint(tmp_path / "unet.safetensors")
    assert (checkpoint.folder, checkpoint.stem, list(checkpoint.tensors)) == (None, "unet", ["a"])


def test_other_stems(tmp_path):
    folder = save(tmp_path / "d", state_dict(0), 2, stem="diffusion_pytorch_model")
    assert Checkpoint(folder).stem == "diffusion_pytorch_model"
    assert Checkpoint(save(tmp_path / "e", state_dict(0), 1, stem="unet")).stem == "unet"


def test_shards_may_be_links_as_in_a_download_cache(tmp_path):
    folder = save(tmp_path / "m", state_dict(0), 2)
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for file in folder.glob("*.safetensors"):
        target = blobs / f"{file.name}.blob"
        file.rename(target)
        file.symlink_to(target)
    assert Checkpoint(folder).load("model.norm.weight").shape == (16,)


def rewrite_index(folder, change):
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    change(index)
    file.write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i: i["weight_map"].update(scale="model-00009-of-00002.safetensors"), "missing; the download"),
        (lambda i: i["weight_map"].update(scale="../base/model.safetensors"), "not a file name inside this folder"),
        (lambda i: i["weight_map"].update(scale="/etc/passwd"), "not a file name inside this folder"),
        (lambda i: i["weight_map"].update(scale="..\\model.safetensors"), "not a file name inside this folder"),
        (lambda i: i["weight_map"].update(scale=".."), "not a file name inside this folder"),
        (lambda i: i["weight_map"].update(scale="pytorch_model.bin"), "not a .safetensors file"),
        (lambda i: i["weight_map"].update(ghost="model-00001-of-00002.safetensors"), "places ghost in .* not there"),
        (lambda i: i["weight_map"].pop("scale"), "scale is in a shard but not in the index"),
        (lambda i: i.pop("weight_map"), "expected a weight_map"),
        (lambda i: i.update(weight_map=[1]), "expected a weight_map"),
        (lambda i: i.update(weight_map={"a": 3}), "expected a weight_map"),
    ],
)
def test_damaged_indexes(tmp_path, change, message):
    folder = save(tmp_path / "m", state_dict(0), 2)
    rewrite_index(folder, change)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(folder)


@pytest.mark.parametrize("text", ["{", "[]", "\x00\x01", "[" * 100_000])
def test_an_index_that_is_not_json(tmp_path, text):
    folder = save(tmp_path / "m", state_dict(0), 2)
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match="JSON"):
        Checkpoint(folder)


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1, -1000])
def test_truncated_files(tmp_path, keep):
    folder = save(tmp_path / "m", state_dict(0))
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a readable safetensors file"):
        Checkpoint(folder)


def test_a_header_that_claims_too_much(tmp_path):
    file = tmp_path / "x.safetensors"
    file.write_bytes(b"\xff" * 8 + b"{}")
    with pytest.raises(CheckpointError, match="not a readable"):
        Checkpoint(file)


def test_the_same_tensor_in_two_shards(tmp_path):
    folder = save(tmp_path / "m", state_dict(0), 2)
    first, second = sorted(folder.glob("*.safetensors"))
    second.write_bytes(first.read_bytes())
    with pytest.raises(CheckpointError, match="is both in"):
        Checkpoint(folder)


def test_pickles_are_refused(tmp_path):
    folder = tmp_path / "m"
    folder.mkdir()
    torch.save({"a": torch.ones(2)}, folder / "pytorch_model.bin")
    with pytest.raises(PickleRefused, match=r"pytorch_model\.bin.*Convert it to safetensors"):
        Checkpoint(folder)
    with pytest.raises(PickleRefused, match="pickled weights"):
        Checkpoint(folder / "pytorch_model.bin")


def test_what_is_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder or file"):
        Checkpoint(tmp_path / "nowhere")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(CheckpointError, match=r"expected a model folder or a \.safetensors file"):
        Checkpoint(tmp_path / "a.txt")
    with pytest.raises(CheckpointError, match=r"no \.safetensors file and no index"):
        Checkpoint(tmp_path)
    save_file({}, tmp_path / "empty.safetensors")
    with pytest.raises(CheckpointError, match="no tensors"):
        Checkpoint(tmp_path / "empty.safetensors")


def test_ambiguous_folders(tmp_path):
    for name in ("a", "b"):
        save_file({"w": torch.ones(2)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match=r"2 \.safetensors files and no index"):
        Checkpoint(tmp_path)
    for name in ("a", "b"):
        (tmp_path / f"{name}.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="2 index files"):
        Checkpoint(tmp_path)


def test_adapters_and_quantised_models_are_refused(tmp_path):
    adapter = save(tmp_path / "lora", {"a": torch.ones(2)}, stem="adapter_model")
    with pytest.raises(CheckpointError, match="LoRA adapter; merge it into its base"):
        Checkpoint(adapter)
    packed = save(tmp_path / "gptq", state_dict(0), config={"quantization_config": {"bits": 4}})
    with pytest.raises(CheckpointError, match="quantised"):
        Checkpoint(packed)


def test_a_file_that_vanishes_after_opening(tmp_path):
    (base, *_), _, _ = family(tmp_path)
    checkpoint = Checkpoint(base)
    (base / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cannot read scale"):
        checkpoint.load("scale")
