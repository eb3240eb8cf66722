import errno
import json
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from checkpoints import family, save, state_dict
from compare import same_bits
from safetensors.torch import load_file, save_file

from r_tsvm_kernels import CheckpointError, InputChangedError
from r_tsvm_kernels.checkpoint import Checkpoint, checksum


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


def test_a_pointer_of_git_lfs(tmp_path):
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(CheckpointError, match=r"pointer of Git LFS .* git lfs pull"):
        Checkpoint(tmp_path)


def test_a_header_that_claims_too_much(tmp_path):
    file = tmp_path / "x.safetensors"
    file.write_bytes(b"\xff" * 8 + b"{}")
    with pytest.raises(CheckpointError, match="not a readable"):
        Checkpoint(file)


def test_the_same_tensor_in_two_shards(tmp_path):
    folder = save(tmp_path / "m", state_dict(0), 2)
    first, second = sorted(folder.glob("*.safetensors"))
    second.write_bytes(first.read_bytes())
    with pytest.raises(
        CheckpointError, match=r"the index places .* in model-00002-of-00002.safetensors, but it is not"
    ):
        Checkpoint(folder)


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


def test_gguf(tmp_path):
    file = tmp_path / "model.Q8_0.gguf"
    file.write_bytes(b"GGUF")
    for path in (file, tmp_path):
        with pytest.raises(CheckpointError, match=r"GGUF weights; .*gguf_file=.*save_pretrained"):
            Checkpoint(path)


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
    with pytest.raises(CheckpointError, match="a LoRA adapter, not a model"):
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


def test_rows_of_a_tensor(tmp_path):
    tensors = state_dict(3, torch.bfloat16)
    checkpoint = Checkpoint(save(tmp_path / "m", tensors))
    for name, tensor in tensors.items():
        for rows in [(0, 0), (0, 1), (1, 2), (0, 2), (2, 2)] if tensor.ndim and len(tensor) else []:
            assert same_bits(checkpoint.load(name, rows=rows), tensor[slice(*rows)])
    for name, rows in [("scale", (0, 1)), ("mask", (1, 3)), ("mask", (-1, 1)), ("mask", (2, 1)), ("nothing", (0, 1))]:
        with pytest.raises(CheckpointError, match=f"{name} has shape"):
            checkpoint.load(name, rows=rows)


def test_threads_may_load_at_once(tmp_path):
    tensors = {f"t{i}": torch.full((1000, 50), i) for i in range(40)}
    checkpoint = Checkpoint(save(tmp_path / "m", tensors, 3))
    with ThreadPoolExecutor(8) as pool:
        loaded = list(pool.map(checkpoint.load, [*tensors] * 5))
    assert all(same_bits(*pair) for pair in zip(loaded, [*tensors.values()] * 5, strict=True))


def test_tensors_come_in_the_order_of_their_bytes(tmp_path):
    checkpoint = Checkpoint(save(tmp_path / "m", state_dict(0), 2))
    places = [(header.file.name, header.offset) for header in checkpoint.tensors.values()]
    assert places == sorted(places)


def test_loaded_tensors_are_no_map_of_the_file(tmp_path):
    checkpoint = Checkpoint(save(tmp_path / "m", {"a": torch.ones(5000)}))
    loaded = checkpoint.load("a")
    assert "model.safetensors" not in Path("/proc/self/maps").read_text()
    loaded.zero_()
    assert same_bits(checkpoint.load("a"), torch.ones(5000))


def flip(file):
    """Change one byte, keep the size, and give the file back its old time of change."""
    times = (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    with file.open("r+b") as stream:
        stream.seek(-1, 2)
        last = stream.read(1)[0]
        stream.seek(-1, 2)
        stream.write(bytes([last ^ 1]))
    os.utime(file, ns=times)


@pytest.mark.parametrize(
    "change",
    [flip, Path.unlink, lambda file: os.truncate(file, file.stat().st_size - 1), lambda file: os.utime(file, (1, 1))],
    ids=["flipped", "gone", "truncated", "nonzero_support"],
)
@pytest.mark.parametrize("name", ["model-00002-of-00002.safetensors", "config.json", "model.safetensors.index.json"])
def test_changed_inputs_are_noticed(tmp_path, name, change):
    folder = save(tmp_path / "m", state_dict(0), 2)
    checkpoint = Checkpoint(folder)
    checkpoint.check_unchanged()
    assert folder / name in {state.path for state in checkpoint.files()}
    change(folder / name)
    with pytest.raises(InputChangedError, match=name):
        checkpoint.check_unchanged()
    if name.endswith(".safetensors"):
        inside = next(n for n, header in checkpoint.tensors.items() if header.file.name == name and header.nbytes)
        with pytest.raises(CheckpointError, match=inside):
            checkpoint.load(inside)


def test_file_states_tell_headers_apart(tmp_path):
    states = [Checkpoint(save(tmp_path / n, {n: torch.ones(2)})).files() for n in ("a", "b")]
    assert states[0][0].header_checksum != states[1][0].header_checksum
    assert states[0] == Checkpoint(tmp_path / "a").files()


def test_an_opened_checkpoint_travels_to_other_processes(tmp_path):
    tensors = state_dict(0)
    sent = pickle.dumps(Checkpoint(save(tmp_path / "m", tensors, 2)))
    assert all(same_bits(pickle.loads(sent).load(name), tensor) for name, tensor in tensors.items())


def test_read_errors_name_file_and_tensor(tmp_path, monkeypatch):
    checkpoint = Checkpoint(save(tmp_path / "m", state_dict(0)))

    def broken(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot read scale: Input/output error"):
        checkpoint.load("scale")


def test_the_system_may_read_less_than_it_was_asked_for(tmp_path, monkeypatch):
    tensors = {"a": torch.arange(1000)}
    checkpoint = Checkpoint(save(tmp_path / "m", tensors))
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, buffers, offset: preadv(file, [buffers[0][:7]], offset))
    assert same_bits(checkpoint.load("a"), tensors["a"])
    assert same_bits(checkpoint.load("a", rows=(3, 77)), tensors["a"][3:77])


def test_the_index_of_the_model_is_followed(tmp_path):
    folder = save(tmp_path / "m", state_dict(0), 2)
    for part in (1, 2):  # the vendor's own copy, under other names
        save_file({f"v{part}": torch.ones(2)}, folder / f"consolidated-{part:05d}-of-00002.safetensors")
    places = {f"v{part}": f"consolidated-{part:05d}-of-00002.safetensors" for part in (1, 2)}
    (folder / "consolidated.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    checkpoint = Checkpoint(folder)
    assert checkpoint.tensors.keys() == state_dict(0).keys()
    assert "consolidated.safetensors.index.json" in checkpoint.notes[0]
    with pytest.raises(CheckpointError, match="an index; give its folder"):
        Checkpoint(folder / "model.safetensors.index.json")


@pytest.mark.parametrize("gone", [False, True])
def test_an_index_beside_a_single_file(tmp_path, gone):
    folder = save(tmp_path / "m", state_dict(0), 2)
    save_file({"other": torch.ones(2)}, folder / "model.safetensors")
    if gone:  # the shards were joined, the index was left
        (folder / "model-00001-of-00002.safetensors").unlink()
    found = Checkpoint(folder)
    assert ("other" in found.tensors) == gone
    assert ("model.safetensors" if not gone else "index.json") in found.notes[0]


def test_the_vendors_file_is_read_if_there_is_no_other(tmp_path):
    save_file({"vendor": torch.ones(2)}, tmp_path / "consolidated.safetensors")
    assert list(Checkpoint(tmp_path).tensors) == ["vendor"]
    save_file({"w": torch.ones(2)}, tmp_path / "model-00001-of-00001.safetensors")
    assert list(Checkpoint(tmp_path).tensors) == ["w"]


def test_tensors_that_the_index_does_not_place_there_are_ignored(tmp_path):
    folder = save(tmp_path / "m", state_dict(0), 2)
    first, second = sorted(folder.glob("*.safetensors"))
    save_file(load_file(second) | {"rotary.inv_freq": torch.ones(3)}, second)
    doubled = next(iter(load_file(second)))
    save_file(load_file(first) | {doubled: torch.zeros(5)}, first)
    checkpoint = Checkpoint(folder)
    assert checkpoint.tensors.keys() == state_dict(0).keys()
    assert torch.equal(checkpoint.load(doubled), load_file(second)[doubled])
    assert doubled in checkpoint.notes[0]
    assert "rotary.inv_freq" in checkpoint.notes[0]


@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_single_rows(tmp_path, kind, dtype, monkeypatch):
    monkeypatch.setattr("r_tsvm_kernels.checkpoint.reader._PIECE_BYTES", 30)  # two rows of three values
    tensors = {"other": torch.ones(5), "w": torch.arange(30, dtype=torch.float32).reshape(10, 3)}
    if kind.endswith(".bin"):
        torch.save(tensors, tmp_path / kind)
    else:
        save_file(tensors, tmp_path / kind)
    checkpoint = Checkpoint(tmp_path, allow_pickle=True)
    rows = torch.tensor([3, 4, 5, 6, 7, -1, 0, 9, 8, -1, -1, 0])
    out = torch.full((len(rows), 3), -7, dtype=dtype)
    checkpoint.load_rows("w", rows, out)
    expected = tensors["w"][rows.clamp(min=0)].to(dtype)
    expected[rows < 0] = -7
    assert torch.equal(out, expected)
    assert checkpoint.checksum("w") == checksum(tensors["w"])
    (tmp_path / kind).write_bytes((tmp_path / kind).read_bytes()[:-8])
    with pytest.raises(InputChangedError):
        checkpoint.load_rows("w", rows, out)
