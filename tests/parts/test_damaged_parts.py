"""Parts that are damaged, or of several decompositions, are refused: nothing is merged from them silently."""

import json
import shutil

import pytest
import torch
from checkpoints import family
from safetensors.torch import load_file, save_file

from r_tsvm_kernels import (
    CheckpointError,
    ConvergenceError,
    MergeConfig,
    Parts,
    decompose_checkpoints,
    merge_checkpoints,
)
from r_tsvm_kernels.parts import from_parts

MATRIX = "model.embed_tokens.weight"


@pytest.fixture
def recipe(tmp_path):
    paths, _, _ = family(tmp_path / "in", tasks=3)
    return MergeConfig("tsvm", base_model=paths[0], models=paths[1:])


def in_json(change):
    """Return a function that changes ``parts.json``: the content, and the entry of a matrix."""

    def damage(folder):
        content = json.loads((folder / "parts.json").read_text())
        change(content, content["tensors"][MATRIX])
        (folder / "parts.json").write_text(json.dumps(content))

    return damage


@pytest.mark.parametrize(
    "change",
    [
        lambda content, entry: entry.update(products=[[1.0]]),
        lambda content, entry: entry.update(rounding=[]),
        lambda content, entry: entry.update(rounding=[float("nan")] * 3),
        lambda content, entry: entry.update(error=float("nan")),
        lambda content, entry: entry.update(shape=[-1, 3]),
        lambda content, entry: entry.update(kind="base"),
        lambda content, entry: entry.update(kind={"dense": "factors", "factors": "dense"}[entry["kind"]]),
        lambda content, entry: entry.update(certificate={}),
        lambda content, entry: entry["certificate"].update(error="x"),
        lambda content, entry: entry["checksums"].reverse(),
        lambda content, entry: entry.pop("checksums"),
        lambda content, entry: content["tensors"].pop(MATRIX),
        lambda content, entry: content["tensors"].clear(),
        lambda content, entry: content["tasks"].reverse(),
        lambda content, entry: content["tasks"].pop(),
        lambda content, entry: content["recipe"].clear(),
        lambda content, entry: content["recipe"].update(models="x"),
        lambda content, entry: content["recipe"]["models"].pop(),
    ],
)
def test_a_changed_description(recipe, tmp_path, change):
    decompose_checkpoints(recipe, tmp_path / "parts")
    in_json(change)(tmp_path / "parts")
    with pytest.raises(CheckpointError, match="decompose again"):
        merge_checkpoints(recipe.model_copy(update={"parts": str(tmp_path / "parts")}), tmp_path / "out")
    with pytest.raises(CheckpointError, match="decompose again"):
        Parts.load(tmp_path / "parts").state_dict()
    assert not (tmp_path / "out").exists()


def two_files_alike(folder):
    shutil.copy(folder / "expert0.safetensors", folder / "expert1.safetensors")


def a_file_of_other_weights(folder):
    tensors = load_file(folder / "expert1.safetensors")
    save_file({name: 2 * x for name, x in tensors.items()}, folder / "expert1.safetensors")


def one_bit(folder):
    file = folder / "expert1.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-5] ^= 1
    file.write_bytes(raw)


@pytest.mark.parametrize("dense", [None, 0], ids=["factors", "dense"])
@pytest.mark.parametrize("damage", [two_files_alike, a_file_of_other_weights, one_bit])
def test_changed_values(recipe, tmp_path, damage, dense):
    decompose_checkpoints(recipe, tmp_path / "parts", dense_above=dense)
    asked = from_parts(recipe, tmp_path / "parts")
    part = MergeConfig("task_arithmetic", base_model=recipe.base_model, models=[tmp_path / "parts/expert1.safetensors"])
    parts = Parts.load(tmp_path / "parts")
    before = parts.state_dict()
    damage(tmp_path / "parts")
    calls = [
        lambda: merge_checkpoints(asked, tmp_path / "out"),
        lambda: merge_checkpoints(asked, tmp_path / "out", threads=1, memory="1GB", restart=True),
        lambda: merge_checkpoints(part, tmp_path / "adapted"),
        lambda: Parts.load(tmp_path / "parts").state_dict(),
        parts.state_dict,  # opened before: the file has changed since
    ]
    for call in calls:
        with pytest.raises(CheckpointError, match=r"expert1.*(of another decomposition|changed since)"):
            call()
    assert not (tmp_path / "out").exists() and not (tmp_path / "adapted").exists() and len(before) > 3


def test_files_of_another_dtype(recipe, tmp_path):
    decompose_checkpoints(recipe, tmp_path / "parts")
    decompose_checkpoints(recipe, tmp_path / "short", store_dtype="bfloat16")
    for task in range(3):
        shutil.copy(tmp_path / f"short/expert{task}.safetensors", tmp_path / f"parts/expert{task}.safetensors")
    with pytest.raises(CheckpointError, match="of another decomposition"):
        merge_checkpoints(from_parts(recipe, tmp_path / "parts"), tmp_path / "out")


def test_rows_that_are_read_in_pieces(recipe, tmp_path):
    """The checksum of a matrix of which some rows are read at a time is that of all of them."""
    shape = (4096, 512)
    base = torch.randn(shape)
    paths = []
    for number in range(3):
        save_file({"w": base + 0.01 * number * torch.randn(shape)}, tmp_path / f"m{number}.safetensors")
        paths.append(tmp_path / f"m{number}.safetensors")
    own = MergeConfig("tsvm", base_model=paths[0], models=paths[1:])
    decompose_checkpoints(own, tmp_path / "parts", dense_above=0)
    asked = from_parts(own, tmp_path / "parts")
    whole = merge_checkpoints(asked, tmp_path / "whole.safetensors")
    assert whole.reports["w"].certificate.met
    file = tmp_path / "parts/m1.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-shape[0] * shape[1] * 2] ^= 1
    file.write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"m1.*w is not what parts.json"):
        merge_checkpoints(asked, tmp_path / "out.safetensors")


def test_a_lower_rank_reads_and_checks_all(recipe, tmp_path):
    decompose_checkpoints(recipe, tmp_path / "parts")
    asked = from_parts(recipe, tmp_path / "parts").model_copy(update={"parts_rank": 1})
    merge_checkpoints(asked, tmp_path / "out")
    one_bit(tmp_path / "parts")
    with pytest.raises(CheckpointError, match="of another decomposition"):
        merge_checkpoints(asked, tmp_path / "again")


@pytest.mark.parametrize("how", [{"store_dtype": "bfloat16"}, {}], ids=["stored", "decomposed"])
def test_parts_that_no_weights_make_accurate(recipe, tmp_path, how):
    """The message names the cause: not the weights, but how the parts were made."""
    made = recipe if how else recipe.model_copy(update={"parameters": {"mode": "fast"}})
    decompose_checkpoints(made, tmp_path / "parts", **how)
    asked = from_parts(recipe, tmp_path / "parts")
    with pytest.raises(ConvergenceError, match=r"the dtype that they are stored in; decompose again.*mode: fast"):
        merge_checkpoints(asked, tmp_path / "out")
    fast = asked.model_copy(update={"parameters": {"mode": "fast"}})
    assert merge_checkpoints(fast, tmp_path / "out", restart=True).reports[MATRIX].certificate.met
