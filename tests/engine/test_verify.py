"""`verify_output` and `rtsvm verify` see every way in which an output can differ from what was written."""

import json
import shutil

import pytest
import torch
from checkpoints import family
from safetensors.torch import load_file, save_file

from r_tsvm_kernels import CheckpointError, JournalError, MergeConfig, merge_checkpoints, verify_output
from r_tsvm_kernels.cli import main


@pytest.fixture(params=["out", "out.safetensors"])
def out(request, tmp_path):
    """A merged output, as a folder of two shards or more, or as one file."""
    (base, *tuned), _, _ = family(tmp_path / "in", shards=(1,))
    config = MergeConfig(base_model=str(base), models=tuple({"model": str(path)} for path in tuned))
    return merge_checkpoints(config, tmp_path / request.param, shard_size=8000).path


def file_with(out, name):
    if out.is_file():
        return out
    return next(file for file in out.glob("*.safetensors") if name in load_file(file))


def rewrite(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def flip(file, position=-1):
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.write_bytes(data)


def test_nothing_differs(out, tmp_path):
    seen = []
    found = verify_output(out, inputs=True, progress=lambda done, total: seen.append((done, total)))
    assert found.ok and found.tensors == 10 and seen == [(i, 10) for i in range(1, 11)]
    if out.is_dir():
        assert verify_output(shutil.copytree(out, tmp_path / "copy")).ok


def test_a_flipped_byte(out):
    flip(file_with(out, "mask"))
    found = verify_output(out)
    assert not found.ok and len(found.changed) == 1 and not (found.missing or found.extra)


def test_a_tensor_that_was_swapped_for_another(out):
    def swap(tensors):
        first, second = (f"model.layers.{i}.attn.weight" for i in (0, 1))
        tensors[first], tensors[second] = tensors[second], tensors[first]

    file = file_with(out, "model.layers.0.attn.weight")
    rewrite(file, swap)
    assert {"model.layers.0.attn.weight", "model.layers.1.attn.weight"} <= set(verify_output(out).changed)


def test_another_shape_with_the_same_bytes(out):
    file = file_with(out, "model.norm.weight")
    data = file.read_bytes()
    assert data.count(b'"shape":[32,16]') >= 1
    file.write_bytes(data.replace(b'"shape":[32,16]', b'"shape":[16,32]', 1))
    assert len(verify_output(out).changed) == 1


def test_another_dtype_with_the_same_bytes(out):
    file = file_with(out, "mask")
    data = file.read_bytes()
    file.write_bytes(data.replace(b'"dtype":"BOOL"', b'"dtype":"U8"  ', 1))
    assert verify_output(out).changed == ["mask"]


def test_missing_and_extra_tensors(out):
    rewrite(file_with(out, "scale"), lambda tensors: tensors.update(more=tensors.pop("scale")))
    for index in out.glob("*.index.json"):
        index.write_text(index.read_text().replace('"scale"', '"more"'))
    found = verify_output(out)
    assert (found.missing, found.extra) == (["scale"], ["more"])


def test_what_cannot_be_read(out):
    if out.is_dir():
        rewrite(file_with(out, "scale"), lambda tensors: tensors.pop("scale"))
        with pytest.raises(CheckpointError, match="the index places scale in"):
            verify_output(out)
    file = file_with(out, "mask")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"truncated\?"):
        verify_output(out)


def test_changed_inputs(out, tmp_path):
    rewrite(tmp_path / "in" / "expert1" / "model.safetensors", lambda tensors: tensors["scale"].add_(1))
    # Buffers are the base's; those of other models were not read and do not count.
    rewrite(tmp_path / "in" / "expert0" / "model.safetensors", lambda tensors: tensors["position_ids"].add_(1))
    assert verify_output(out).ok
    assert verify_output(out, inputs=True).inputs_changed == [f"{tmp_path / 'in' / 'expert1'}: scale"]


def test_without_a_journal(out):
    journal = out.with_suffix(".merge_journal.jsonl") if out.is_file() else out / "merge_journal.jsonl"
    journal.unlink()
    with pytest.raises(JournalError, match="missing or empty"):
        verify_output(out)


def test_large_tensors_are_read_in_pieces(out, monkeypatch):
    monkeypatch.setattr("r_tsvm_kernels.checkpoint.reader._PIECE_BYTES", 100)
    assert verify_output(out, inputs=True).ok


# --- the command ----------------------------------------------------------------------------------------------------


def test_the_command(out, capsys, tmp_path):
    assert main(["verify", "--inputs", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}: 10 tensors are as they were written; the inputs have not changed\n"
    rewrite(tmp_path / "in" / "base" / "model.safetensors", lambda tensors: tensors["scale"].add_(1))
    assert main(["verify", "--inputs", str(out)]) == 1
    printed = capsys.readouterr().out
    assert f"input changed: {tmp_path / 'in' / 'base'}: scale" in printed and "; the inputs have changed" in printed
    flip(file_with(out, "mask"))
    assert main(["verify", str(out)]) == 1
    printed = capsys.readouterr().out
    assert "changed: mask" in printed and "NOT what was written" in printed
    assert main(["verify", "--json", str(out)]) == 1
    assert json.loads(capsys.readouterr().out) == {
        "ok": False, "tensors": 10, "missing": [], "extra": [], "changed": ["mask"], "inputs_changed": [],
    }  # fmt: skip


def test_the_command_names_ten_of_many(tmp_path, capsys):
    from checkpoints import save

    paths = [save(tmp_path / name, {f"w{i}": torch.ones(4) for i in range(13)}) for name in "ab"]
    config = MergeConfig(merge_method="linear", base_model=str(paths[0]), models=({"model": str(paths[1])},))
    out = merge_checkpoints(config, tmp_path / "out").path
    rewrite(out / "model.safetensors", lambda tensors: [tensor.add_(1) for tensor in tensors.values()])
    assert main(["verify", str(out)]) == 1
    assert capsys.readouterr().out.count("changed: ") == 11


def test_the_command_on_something_else(tmp_path, capsys):
    assert main(["verify", str(tmp_path)]) == 1
    assert "was this written by `rtsvm merge`?" in capsys.readouterr().err
