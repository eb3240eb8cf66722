"""The files of the base that an output has beside its weights, and the modules of a model in folders of their own."""

import os
import stat

import pytest
import torch
from checkpoints import digest, save
from safetensors.torch import load_file, save_file
from test_report_files import stop_after

from r_tsvm_kernels import CheckpointError, MergeConfig, merge_checkpoints

# Every merge writes these.
OURS = {"README.md", "merge_journal.jsonl", "merge_recipe.yaml", "merge_report.html", "merge_report.json"}


def merge(base, *tuned, out, method="task_arithmetic", **options):
    models = tuple({"model": str(path)} for path in tuned)
    config = MergeConfig(merge_method=method, base_model=str(base), models=models)
    merge_checkpoints(config, out, **options)
    return {path for path in digest(out) if path not in OURS}


def pair(folder, stem="model"):
    """Write a base and a fine-tune of one tensor; return their paths and what their sum of task vectors is."""
    base, tuned = torch.randn(8, 4), torch.randn(8, 4)
    paths = [save(folder / name, {"w.weight": t}, stem=stem) for name, t in (("base", base), ("tuned", tuned))]
    return *paths, base + (tuned - base)


def test_what_belongs_to_the_model_and_nothing_else(tmp_path):
    base, tuned, _ = pair(tmp_path)
    wanted = {
        "chat_template.jinja", "additional_chat_templates/tools.jinja", "modeling_toy.py", "tekken.json", "vocab.txt",
        "custom_generate/generate.py", "LICENSE",
    }  # fmt: skip
    left = {
        "adapter_config.json", "trainer_state.json", "quantize_config.json", "optimizer.pt", "run.log",
        "model.safetensors.index.fp16.json", "MERGE_REPORT.json", "README.md", "runs/events.json",
        "checkpoint-10/config.json", "additional_chat_templates/adapter_config.json", "onnx/config.json",
    }  # fmt: skip
    for name in wanted | left:
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(f"the base's {name}")
    assert merge(base, tuned, out=tmp_path / "out") == wanted | {"config.json", "tokenizer.json", "model.safetensors"}
    assert all((tmp_path / "out" / name).read_text() == f"the base's {name}" for name in wanted)
    assert "the base's" not in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("stem", ["LICENSE", "NOTICE-of-base", "adapter", "merge_report"])
@pytest.mark.parametrize("shard_size", ["5GB", 100])
def test_weights_of_any_name_are_the_merged_ones(tmp_path, stem, shard_size):
    base, tuned, expected = pair(tmp_path, stem)
    second = {"v.weight": torch.zeros(8, 4)}
    for path in (base, tuned):
        save_file(load_file(path / f"{stem}.safetensors") | second, path / f"{stem}.safetensors")
    merge(base, tuned, out=tmp_path / "out", shard_size=shard_size)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) == (1 if shard_size == "5GB" else 2) and all(file.name.startswith(stem) for file in files)
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    torch.testing.assert_close(found["w.weight"], expected)


@pytest.mark.parametrize("target", ["gone", "vocab.json"])
def test_a_file_that_cannot_be_read_is_named_before_the_work(tmp_path, monkeypatch, target):
    """A link that leads nowhere, or to itself: it must not be missing from the output in silence."""
    base, tuned, _ = pair(tmp_path)
    (base / "vocab.json").symlink_to(target)
    stop_after(0, monkeypatch)
    with pytest.raises(CheckpointError, match=r"base/vocab\.json: cannot be read: (No such file|Too many levels)"):
        merge(base, tuned, out=tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "tuned"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_without_permission_is_named(tmp_path):
    base, tuned, _ = pair(tmp_path)
    (base / "vocab.json").write_text("{}")
    (base / "vocab.json").chmod(stat.S_IWUSR)
    with pytest.raises(CheckpointError, match=r"base/vocab\.json: cannot be read: Permission denied"):
        merge(base, tuned, out=tmp_path / "out")


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file_is_left(tmp_path, make):
    base, tuned, _ = pair(tmp_path)
    make(base / "vocab.json")
    assert "vocab.json" not in merge(base, tuned, out=tmp_path / "out")


def test_a_resumed_merge_has_the_files_of_the_base_as_they_are(tmp_path, monkeypatch):
    base, tuned, _ = pair(tmp_path)
    for path in (base, tuned):
        save_file(load_file(path / "model.safetensors") | {"v": torch.zeros(3)}, path / "model.safetensors")
    (base / "vocab.json").write_text("long, then cut short")
    stop_after(1, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        merge(base, tuned, out=tmp_path / "out", threads=1)
    monkeypatch.undo()
    (tmp_path / ".out.partial" / "vocab.json").write_text("long, th")
    merge(base, tuned, out=tmp_path / "out", resume=True)
    assert (tmp_path / "out" / "vocab.json").read_text() == "long, then cut short"
