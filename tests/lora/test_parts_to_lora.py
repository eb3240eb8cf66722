"""`rtsvm decompose --as-lora`: the parts as adapters, also after it was stopped."""

import json
import signal
import subprocess
import sys

import pytest
import torch
from adapters import dense_updates
from checkpoints import digest, family, save
from safetensors.torch import load_file

from r_tsvm_kernels import CheckpointError, MergeConfig, Parts, decompose_checkpoints, parts_to_lora
from r_tsvm_kernels.cli import main
from r_tsvm_kernels.lora import Adapter

# Ends itself with SIGKILL: after so many entries of the journal, or before so many adapters are complete.
KILLED = """
import os, signal, sys
from r_tsvm_kernels.cli import main
from r_tsvm_kernels.engine import job
from r_tsvm_kernels.engine.journal import Journal
from r_tsvm_kernels.lora import AdapterWriter
job.COMMIT_SECONDS, done = 0.0, []
where, count, *command = sys.argv[1:]
def stop_at(owner, name):
    original = getattr(owner, name)
    def counted(self, *arguments, **options):
        original(self, *arguments, **options)
        done.append(name)
        if len(done) >= int(count):
            os.kill(os.getpid(), signal.SIGKILL)
    setattr(owner, name, counted)
stop_at(*((Journal, "append") if where == "parts" else (AdapterWriter, "finish")))
main(command)
"""


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Write a base and three fine-tunes; return the command, with relative paths."""
    family(tmp_path, tasks=3, config={"model_type": "toy", "tie_word_embeddings": False})
    monkeypatch.chdir(tmp_path)
    models = [word for t in range(3) for word in ("--model", f"expert{t}")]
    return ["decompose", "--base", "base", *models, "--method", "tsvm", "--quiet", "--as-lora"]


def left_in(folder):
    return sorted(
        path.name for path in folder.iterdir() if path.name not in {"base", *(f"expert{t}" for t in range(3))}
    )


def test_the_adapters_are_the_parts(command, tmp_path):
    assert main([*command, "--embed-lora", "out"]) == 0
    assert left_in(tmp_path) == ["out"]
    decompose_checkpoints(MergeConfig("tsvm", base_model="base", models=[f"expert{t}" for t in range(3)]), "parts")
    base = load_file("base/model.safetensors")
    for t in range(3):
        alone = Parts.load("parts").state_dict({f"expert{i}": float(i == t) for i in range(3)}, 1.0)
        updates = dense_updates(tmp_path / "out" / f"expert{t}")
        assert len(updates) == 5
        for module, update in updates.items():
            expected = (alone[f"{module}.weight"] - base[f"{module}.weight"]).double()
            update = update.mT if "embed" in module else update  # PEFT turns the tables of embeddings
            torch.testing.assert_close(update, expected, rtol=0, atol=2e-6)
        report = json.loads((tmp_path / "out" / f"expert{t}" / "lora_report.json").read_text())
        assert set(report["left_out"]) >= {"model.norm.weight", "scale", "mask"}


def test_ranks_are_cut_to_the_best(command, tmp_path):
    assert main([*command, "whole"]) == main([*command, "--lora-rank", "2", "cut"]) == 0
    for t in range(3):
        whole, found = (dense_updates(tmp_path / out / f"expert{t}") for out in ("whole", "cut"))
        for module, update in whole.items():
            U, S, Vh = torch.linalg.svd(update)
            torch.testing.assert_close(found[module], (U[:, :2] * S[:2]) @ Vh[:2], rtol=0, atol=1e-6)
        assert max(module.rank for module in Adapter(tmp_path / "cut" / f"expert{t}").modules.values()) == 2


@pytest.mark.parametrize("stops", [[("parts", 2)], [("parts", 1), ("parts", 4), ("adapters", 1)], [("adapters", 2)]])
def test_kill_and_resume(command, tmp_path, stops, capsys):
    assert main([*command, "whole"]) == 0
    for where, count in stops:
        program = [sys.executable, "-c", KILLED, where, str(count), *command, "--resume", "out"]
        assert subprocess.run(program).returncode == -signal.SIGKILL
        assert not (tmp_path / "out").exists()
    assert main([*command, "out"]) != 0
    assert "--resume" in capsys.readouterr().err
    other = [*command[:3], *command[5:]]  # without the first model
    assert main([*other, "--resume", "out"]) != 0
    assert "--restart" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert main([*command, "--resume", "out"]) == 0
    assert left_in(tmp_path) == ["out", "whole"]
    for t in range(3):
        for file in ("adapter_model.safetensors", "adapter_config.json"):
            assert (tmp_path / "out" / f"expert{t}" / file).read_bytes() == (
                tmp_path / "whole" / f"expert{t}" / file
            ).read_bytes()


@pytest.mark.parametrize("where", ["parts", "adapters"])
def test_restart_starts_over(command, tmp_path, where):
    other = [*command[:3], *command[5:]]
    program = [sys.executable, "-c", KILLED, where, "1", *other, "out"]
    assert subprocess.run(program).returncode == -signal.SIGKILL
    assert main([*command, "--restart", "out"]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [f"expert{t}" for t in range(3)]
    assert left_in(tmp_path) == ["out"]


def test_parts_of_the_user_are_left_alone(command, tmp_path):
    """Whatever their names are."""
    decompose_checkpoints(MergeConfig("tsvm", base_model="base", models=["expert0", "expert1"]), "out.parts")
    before = digest(tmp_path / "out.parts")
    for option in ([], ["--resume"], ["--restart"]):
        out = f"out{''.join(option)}"
        assert main([*command, *option, out]) == 0
        assert len(list((tmp_path / out).iterdir())) == 3
    assert digest(tmp_path / "out.parts") == before


@pytest.mark.parametrize(
    "more, words",
    [
        (["--lora-rank", "0", "out"], "rank"),
        (["out.safetensors"], "folder"),
        (["expert0"], "already in use"),
        (["."], "name"),
    ],
)
def test_mistakes_leave_nothing(command, tmp_path, more, words, capsys):
    before = digest(tmp_path)
    assert main([*command, *more]) != 0
    assert words in capsys.readouterr().err and digest(tmp_path) == before and left_in(tmp_path) == []


def test_options_of_adapters_want_adapters(command, capsys):
    command.remove("--as-lora")
    for option in (["--lora-rank", "2"], ["--embed-lora"]):
        assert main([*command, *option, "out"]) == 2
        assert "--as-lora" in capsys.readouterr().err


def test_parts_to_lora_needs_parts_and_a_base(tmp_path):
    paths, _, _ = family(tmp_path / "in")
    decompose_checkpoints(MergeConfig("tsvm", base_model=paths[0], models=paths[1:]), tmp_path / "parts")
    with pytest.raises(CheckpointError, match=r"parts\.json"):
        parts_to_lora(paths[0], tmp_path / "out")
    other = save(tmp_path / "other", {"model.norm.weight": torch.ones(16)})
    with pytest.raises(CheckpointError):
        parts_to_lora(tmp_path / "parts", tmp_path / "out", base=other)
    assert not list(tmp_path.glob("out/*"))
