"""Evaluations that take their folder away, or leave something running; and the best merge when something changed."""

import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import digest
from safetensors.torch import load_file, save_file
from swept import models
from test_commands import gone, result

from r_tsvm_kernels import (
    EvaluationError,
    MergeConfig,
    OutputBusyError,
    ResumeRefusedError,
    merge_checkpoints,
    sweep_checkpoints,
    verify_output,
)
from r_tsvm_kernels.sweep import commands


@pytest.fixture
def config(tmp_path):
    return models(tmp_path / "in")


def norm(path):
    return sum(x.double().square().sum().item() for x in load_file(path / "model.safetensors").values())


def as_link(path, other):
    shutil.rmtree(path)
    path.symlink_to(other)


def as_file(path, _):
    shutil.rmtree(path)
    path.write_text("gone")


def without_folder(path, _):
    shutil.rmtree(path.parent)


def without_work(path, _):
    shutil.rmtree(path.parent.parent)


@pytest.mark.parametrize("harm", [as_link, as_file, without_folder, without_work])
def test_evaluations_that_take_the_model_away(config, tmp_path, harm):
    other = tmp_path / "precious"
    other.mkdir()
    (other / "file").touch()
    seen = []

    def evaluate(path):
        seen.append(norm(path))
        harm(path, other)
        return seen[-1]

    found = sweep_checkpoints(config, tmp_path / "out", evaluate=evaluate, grids={"alpha": [0.5, 1, 2]})
    assert len(found.ranked) == 3 and not found.failed and len(set(seen)) == 3
    assert verify_output(found.best_path).ok and (other / "file").exists()


def test_a_command_that_deletes_its_folder_has_a_score(tmp_path):
    slot = tmp_path / "slot"
    delete = f"while [ ! -s {slot}/group ]; do sleep 0.01; done; rm -r {slot}; echo why >&2"
    found = result(f"sh -c '{delete}; echo 0.5' {{model}}", tmp_path)
    assert found.scores == {"score": 0.5} and not found.failure and not slot.exists()
    found = result(f"sh -c '{delete}; exit 3' {{model}}", tmp_path)
    assert (found.failure, found.stderr) == ("exit status 3", "why") and not slot.exists()


def test_a_command_that_deletes_its_folder_at_once_has_a_score(tmp_path, monkeypatch):
    monkeypatch.setattr(commands, "_group_file", lambda slot: slot / "deleted" / "group")
    assert result("sh -c 'echo 0.5' {model}", tmp_path).scores == {"score": 0.5}


def test_what_a_command_leaves_running_is_ended(tmp_path):
    for number in (1, 2):  # the second would wait for the process that the first has left
        found = result(f"sh -c 'sleep 600 & echo $! > {tmp_path}/child; echo {number}' {{model}}", tmp_path)
        assert found.scores == {"score": number} and found.seconds < 60
        assert gone(int((tmp_path / "child").read_text()))


# Leaves a process in a session of its own, which keeps what it has inherited.
DAEMON = """
import os, sys, time
if os.fork() == 0:
    os.setsid()
    open(sys.argv[2], "w").write(str(os.getpid()))
    time.sleep(600)
while not os.path.exists(sys.argv[2]):
    time.sleep(0.01)
print(1)
"""


def test_a_process_outside_of_the_group_is_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(commands, "GRACE_SECONDS", 0.2)
    (tmp_path / "daemon.py").write_text(DAEMON)
    command = f"{sys.executable} -S -E {tmp_path}/daemon.py {{model}} {tmp_path}/pid"
    assert result(command, tmp_path).scores == {"score": 1.0}
    child = int((tmp_path / "pid").read_text())
    with pytest.raises(OutputBusyError, match="still runs, in a session of its own; stop it"):
        result(command, tmp_path)
    os.kill(child, 9)
    assert gone(child) and result("sh -c 'echo 2' {model}", tmp_path).scores == {"score": 2.0}


def test_after_a_restart_the_best_is_of_the_models_as_they_are(config, tmp_path):
    options = {"evaluate": norm, "grids": {"alpha": [0.5, 1]}}
    before = digest(sweep_checkpoints(config, tmp_path / "out", **options).best_path)
    file = Path(config.models[0].model) / "model.safetensors"
    save_file({n: x * 2 if x.is_floating_point() else x for n, x in load_file(file).items()}, file)
    with pytest.raises(ResumeRefusedError, match=r"model.safetensors changed"):
        sweep_checkpoints(config, tmp_path / "out", **options)
    found = sweep_checkpoints(config, tmp_path / "out", restart=True, **options)
    assert digest(found.best_path) != before
    merge_checkpoints(config.model_copy(update={"parameters": found.best.values}), tmp_path / "direct")
    assert digest(found.best_path)["model.safetensors"] == digest(tmp_path / "direct")["model.safetensors"]


def deleted(file):
    file.unlink()


def flipped(file):
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)


def cut(file):
    file.write_bytes(file.read_bytes()[:-8])


def other_tensor(file):
    save_file({"other": torch.ones(2)}, file)


@pytest.mark.parametrize("damage", [deleted, flipped, cut, other_tensor])
@pytest.mark.parametrize("name", ["model.safetensors", "merge_journal.jsonl"])
def test_a_damaged_best_merge_is_made_again(config, tmp_path, damage, name):
    options = {"evaluate": norm, "grids": {"alpha": [0.5, 1]}}
    found = sweep_checkpoints(config, tmp_path / "out", **options)
    before, made = digest(found.best_path), (found.best_path / "model.safetensors").stat().st_ino
    sweep_checkpoints(config, tmp_path / "out", **options)
    assert (found.best_path / "model.safetensors").stat().st_ino == made  # nothing to do
    damage(found.best_path / name)
    assert sweep_checkpoints(config, tmp_path / "out", **options).best == found.best
    assert digest(found.best_path)["model.safetensors"] == before["model.safetensors"]
    assert verify_output(found.best_path).ok


def test_what_to_do_if_nothing_has_a_score(config, tmp_path):
    def fails(path):
        raise OSError("no data")

    options = {"evaluate": fails, "grids": {"alpha": [0.5, 1]}}
    with pytest.raises(EvaluationError, match=r"all of 2 failed.*sweep.html; --retry tries them again$"):
        sweep_checkpoints(config, tmp_path / "grid", **options)
    with pytest.raises(EvaluationError, match=r"none was tried in time.*2 are left: run the same command again"):
        sweep_checkpoints(config, tmp_path / "late", time_limit=1e-9, **options)
    pytest.importorskip("optuna", reason="needs the extra search")
    search = {"search": "tpe", "trials": 2, "ranges": {"alpha": "0:1"}}
    with pytest.raises(EvaluationError, match=r"all of 2 failed.*sweep.html; --restart starts the search over$"):
        sweep_checkpoints(config, tmp_path / "search", evaluate=fails, **search)


def test_errors_of_merges_do_not_say_how_to_resume_a_merge(tmp_path):
    """A sweep does that by itself. One tensor overflows float16 when others are finished."""
    tensors = {f"w{number}": torch.ones(8, 8) for number in range(4)}
    for name, last in (("base", 1.0), ("a", 1e4), ("b", 1.5)):
        save_file(tensors | {"w9": torch.full((8, 8), last)}, tmp_path / f"{name}.safetensors")
    config = MergeConfig(
        "task_arithmetic",
        base_model=tmp_path / "base.safetensors",
        models=[tmp_path / "a.safetensors", tmp_path / "b.safetensors"],
        out_dtype="float16",
    )
    found = sweep_checkpoints(config, tmp_path / "out", evaluate=len_of_name, grids={"alpha": [0.5, 100]}, threads=1)
    assert len(found.failed) == 1 and "does not fit float16" in found.failed[0].failure
    assert "resume" not in found.failed[0].failure and "tensors are finished" not in found.failed[0].failure


def len_of_name(path):
    return len(path.name)
