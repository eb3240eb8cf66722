"""File systems that share blocks between files do so where a merge copies tensors."""

import os
import struct
import subprocess

import pytest
import torch
from checkpoints import save
from safetensors.torch import load_file

from r_tsvm_kernels import MergeConfig, merge_checkpoints, verify_output
from r_tsvm_kernels.system import SHARED_BLOCK

fcntl = pytest.importorskip("fcntl", reason="the system has no ioctl")

LAYERS = 4


@pytest.fixture(scope="module")
def tensors():
    generator = torch.Generator().manual_seed(0)
    layers = {f"model.layers.{layer}.w": (600, 1024) for layer in range(LAYERS)}
    shapes = {"model.embed_tokens.weight": (3000, 1024), **layers, "model.norm.weight": (2048,)}
    return {name: torch.randn(shape, generator=generator).to(torch.bfloat16) for name, shape in shapes.items()}


def stacked(path):
    """A recipe that copies layers twice, into places whose distance from the old ones is a multiple of a block."""
    sources = [[{"model": str(path), "layer_range": span}] for span in ([0, 3], [1, LAYERS])]
    return MergeConfig("passthrough", slices=[{"sources": own} for own in sources])


def with_config(folder, tensors):
    path = save(folder, tensors)
    (path / "config.json").write_text(f'{{"model_type": "llama", "num_hidden_layers": {LAYERS}}}')
    return path


RECIPES = {"whole": lambda path: MergeConfig("passthrough", models=[path]), "stacked": stacked}


@pytest.mark.skipif(not hasattr(os, "copy_file_range"), reason="the system has no copy_file_range")
@pytest.mark.parametrize("recipe", RECIPES)
def test_copies_begin_at_the_same_place_of_a_block(tensors, tmp_path, monkeypatch, recipe):
    path = with_config(tmp_path / "a", tensors)
    calls, real = [], os.copy_file_range

    def recorded(source, target, count, offset, place):
        calls.append((count, offset, place))
        return real(source, target, count, offset, place)

    monkeypatch.setattr(os, "copy_file_range", recorded)
    out = merge_checkpoints(RECIPES[recipe](path), tmp_path / "out").path
    assert all((offset - place) % SHARED_BLOCK == 0 for _, offset, place in calls)
    # What is before the first block is copied apart: everything else begins at a block.
    assert all(offset % SHARED_BLOCK == 0 for count, offset, _ in calls if count >= SHARED_BLOCK)
    copied = sum(tensor.nbytes for tensor in load_file(out / "model.safetensors").values())
    assert sum(count for count, _, _ in calls if count >= SHARED_BLOCK) > 0.99 * copied
    assert verify_output(out, inputs=True).ok


def test_computed_tensors_leave_the_header_as_it_is(tensors, tmp_path):
    path = with_config(tmp_path / "a", tensors)
    merge_checkpoints(MergeConfig("linear", models=[path, path], dtype="float32"), tmp_path / "out")
    with (tmp_path / "out" / "model.safetensors").open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = file.read(size)
    assert len(header) - len(header.rstrip()) < 8


@pytest.fixture(params=["btrfs", "xfs"])
def sharing(request, tmp_path):
    """A new file system that shares blocks, in a file; only root may mount it."""
    image, mounted = tmp_path / "image", tmp_path / "mounted"
    mounted.mkdir()
    with image.open("wb") as file:
        file.truncate(400 << 20)
    for command in ([f"mkfs.{request.param}", "-q", image], ["mount", "-o", "loop", image, mounted]):
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=60)
        except (OSError, subprocess.SubprocessError) as error:
            pytest.skip(reason=f"no {request.param} can be made and mounted here: {error}")
    yield mounted
    subprocess.run(["umount", "--lazy", mounted], check=True, timeout=60)


def shared_bytes(path):
    """Return the bytes of a file that it shares with others, by Linux's FIEMAP."""
    start, shared, last = 0, 0, False
    with path.open("rb") as file:
        while not last:
            room = 256
            request = bytearray(struct.pack("=QQIIII", start, 1 << 62, 1, 0, room, 0) + bytes(56 * room))
            fcntl.ioctl(file, 0xC020660B, request)
            count = struct.unpack_from("=I", request, 20)[0]
            if not count:
                break
            for index in range(count):
                begin, _, length, _, _, flags = struct.unpack_from("=QQQQQI", request, 32 + 56 * index)
                shared += length if flags & 0x2000 else 0
                start, last = begin + length, bool(flags & 1)
    return shared


@pytest.mark.exhaustive
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_file_system_shares(tensors, sharing, recipe):
    path = with_config(sharing / "a", tensors)
    out = merge_checkpoints(RECIPES[recipe](path), sharing / "out").path
    file = out / "model.safetensors"
    got = load_file(file)
    assert verify_output(out, inputs=True).ok
    assert torch.equal(got["model.embed_tokens.weight"], tensors["model.embed_tokens.weight"])
    # A block at each end of a tensor, or of a part of one, may belong to two.
    assert shared_bytes(file) > file.stat().st_size - 2 * SHARED_BLOCK * (2 * len(got) + 8)
