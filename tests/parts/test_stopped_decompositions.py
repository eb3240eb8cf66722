"""A decomposition that is killed is resumed to the same bytes, and keeps to its memory."""

import json
import signal
import subprocess
import sys

import pytest
import torch
from checkpoints import family, save, state_dict, tuned_state_dict
from memory import measured
from safetensors.torch import load_file

from r_tsvm_kernels import (
    MergeConfig,
    OutputUnfinishedError,
    Parts,
    ResumeRefusedError,
    decompose_checkpoints,
    merge_checkpoints,
    verify_output,
)
from r_tsvm_kernels.cli import main
from r_tsvm_kernels.parts import from_parts

# Ends itself with SIGKILL after so many entries of the journal.
KILLED = """
import os, signal, sys
from r_tsvm_kernels import decompose_checkpoints
from r_tsvm_kernels.engine import job
from r_tsvm_kernels.engine.journal import Journal
job.COMMIT_SECONDS = 0.0
append = Journal.append
def counted(self, finished):
    append(self, finished)
    if len(self.finished) >= int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
Journal.append = counted
decompose_checkpoints(sys.argv[1], sys.argv[2], resume=True, threads=1)
"""


def bytes_of(folder):
    files = [
        file for file in folder.rglob("*") if file.suffix in (".safetensors", ".yaml") or file.name == "parts.json"
    ]
    return {file.name: file.read_bytes() for file in files}


def test_kill_and_resume(tmp_path):
    paths, _, _ = family(tmp_path / "in", tasks=3)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(MergeConfig("tsvm", base_model=paths[0], models=paths[1:]).to_yaml())
    decompose_checkpoints(recipe, tmp_path / "whole", threads=1)
    for stops in ([1], [2, 5], [1, 3, 4, 7]):
        out = tmp_path / f"killed{len(stops)}"
        for count in stops:
            program = [sys.executable, "-c", KILLED, str(recipe), str(out), str(count)]
            assert subprocess.run(program).returncode == -signal.SIGKILL
            assert not out.exists()
        with pytest.raises(OutputUnfinishedError, match="resume"):
            decompose_checkpoints(recipe, out)
        with pytest.raises(ResumeRefusedError, match="shards"):
            decompose_checkpoints(recipe, out, dense_above=0, resume=True)
        assert decompose_checkpoints(recipe, out, resume=True, threads=2).resumed >= stops[-1]
        assert bytes_of(out) == bytes_of(tmp_path / "whole")
        assert verify_output(out, inputs=True).ok
        assert not (tmp_path / f".{out.name}.partial").exists()


def test_the_command_line(tmp_path, capsys):
    paths, _, _ = family(tmp_path / "in", tasks=3)
    recipe, parts = tmp_path / "recipe.yaml", str(tmp_path / "parts")
    recipe.write_text(MergeConfig("tsvm", base_model=paths[0], models=paths[1:], alpha=0.5).to_yaml())
    assert main(["decompose", str(recipe), parts]) == 0
    assert "rtsvm merge --parts" in capsys.readouterr().out
    asked = ["--weight", "expert1=-0.5", "--set", "alpha=1.2"]
    assert main(["merge", "--parts", parts, *asked, str(tmp_path / "a")]) == 0
    assert main(["merge", str(recipe), "--parts", parts, *asked, str(tmp_path / "b")]) == 0
    weights = [word for weight in ("1", "-0.5", "1") for word in ("--weight", weight)]
    assert main(["merge", "--parts", parts, *weights, "--set", "alpha=1.2", str(tmp_path / "c")]) == 0
    outs = [(tmp_path / out / "model.safetensors").read_bytes() for out in "abc"]
    assert outs[0] == outs[1] == outs[2]
    assert main(["merge", str(tmp_path / "a" / "merge_recipe.yaml"), str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == outs[0]
    report = json.loads((tmp_path / "a" / "merge_report.json").read_text())
    assert report["parameters"]["alpha"] == 1.2 and report["recipe"]["parts"] == parts
    assert main(["verify", parts]) == main(["report", parts]) == main(["inspect", "--parts", parts]) == 0
    for wrong, words in (
        (["--weight", "expert9=1"], "expert9"),
        (["--weight", "1"], "one for each"),
        (["--weight", "x=y"], "NAME=NUMBER"),
        (["--method", "ties"], "one method"),
        (["--set", "exclude_keys=['*mlp*']"], "exclude_keys"),
    ):
        capsys.readouterr()
        assert main(["merge", "--parts", parts, *wrong, str(tmp_path / "no")]) == 2
        assert words in capsys.readouterr().err
    for wrong, words in (
        (["merge", "--parts", parts, "--weight", "=1", "no"], "NAME=NUMBER"),
        (["merge", "--parts", f"{parts}/expert0.safetensors", "no"], f"name the folder, {parts}"),
        (["merge", "--parts", f"{parts}/parts.json", "no"], f"name the folder, {parts}"),
        (["merge", str(tmp_path / "alone.yaml"), "no"], "the recipe names no models"),
        (["decompose", str(recipe)], "no output"),
    ):
        (tmp_path / "alone.yaml").write_text(f"parts: {parts}\n")
        assert main([str(tmp_path / word) if word == "no" else word for word in wrong]) != 0
        assert words in capsys.readouterr().err.replace("\n", " ")
    models = [word for path in paths[1:] for word in ("--model", str(path))]
    assert main(["merge", "--parts", parts, "--base", str(paths[0]), *models, str(tmp_path / "named")]) == 0
    assert main(["merge", "--parts", parts, "--set", "alpha=1", str(tmp_path / "unnamed")]) == 0
    outs = [(tmp_path / out / "model.safetensors").read_bytes() for out in ("named", "unnamed")]
    assert outs[0] == outs[1]
    assert not (tmp_path / "no").exists()
    assert main(["merge", "--parts", str(paths[0]), str(tmp_path / "no")]) != 0
    assert main(["decompose", str(recipe), str(tmp_path / "x.safetensors")]) == 2


def test_odd_names_of_models(tmp_path, monkeypatch, capsys):
    """Equal last parts of paths, one model twice, spaces, and characters of options."""
    names = ["a/math", "b/math", "my model", "modèle-数学", "parts", "w=1", "-dash", "a/math"]
    base = state_dict(0)
    save(tmp_path / "base", base)
    for seed, name in enumerate(dict.fromkeys(names)):
        save(tmp_path / name, tuned_state_dict(base, seed + 1))
    monkeypatch.chdir(tmp_path)
    models = [word for name in names for word in ("--model", f"./{name}")]
    assert main(["decompose", "--base", "base", *models, "--method", "tsvm", "the parts"]) == 0
    assert "rtsvm merge --parts 'the parts' --weight math=0.5" in capsys.readouterr().out
    tasks = ["math", "math-2", "my model", "modèle-数学", "parts-2", "w=1", "-dash", "math-3"]
    assert list(Parts.load("the parts").tasks) == tasks
    weights = [0.5, -1.0, 2.0, 0.0, 1.5, 0.25, -0.5, 3.0]
    own = [f"--weight={task}={weight}" for task, weight in zip(tasks, weights, strict=True)]
    plain = [word for weight in weights for word in ("--weight", str(weight))]
    for out, asked in (("named", own), ("plain", plain)):
        assert main(["merge", "--parts", "the parts", *asked, out]) == 0
    recipe = MergeConfig("tsvm", base_model="base", models=[f"./{name}" for name in names], weight=weights)
    merge_checkpoints(recipe, "direct")
    direct, named = (load_file(f"{out}/model.safetensors") for out in ("direct", "named"))
    for name, tensor in direct.items():
        torch.testing.assert_close(named[name], tensor, rtol=0, atol=2e-6)
    assert (tmp_path / "named/model.safetensors").read_bytes() == (tmp_path / "plain/model.safetensors").read_bytes()
    capsys.readouterr()
    assert main(["merge", "--parts", "the parts", "--weight", "./a/math=1", "no"]) == 2  # which of the two?
    assert "math-3" in capsys.readouterr().err


def test_memory_stays_within_the_schedule(tmp_path):
    """The peak of a decomposition, and of a merge from its parts, is at most what their schedules allow."""
    base = {"w": torch.randn(1024, 1024), "e": torch.randn(6000, 512)}
    paths = [save(tmp_path / "base", base)]
    for t in range(3):
        paths.append(save(tmp_path / f"t{t}", {name: x + 0.01 * torch.randn(x.shape) for name, x in base.items()}))
    (tmp_path / "recipe.yaml").write_text(MergeConfig("tsvm", base_model=paths[0], models=paths[1:]).to_yaml())
    found = measured(
        """
from r_tsvm_kernels import MergeConfig, decompose_checkpoints, merge_checkpoints
from r_tsvm_kernels.engine import make_schedule, decompose
from r_tsvm_kernels.parts import from_parts
from r_tsvm_kernels.plan import Decomposition, make_plan
recipe, allowed = MergeConfig.from_yaml(sys.argv[1] + "/recipe.yaml"), []
small = MergeConfig("tsvm", base_model=recipe.base_model, models=recipe.models, include=["e"])
decompose_checkpoints(small, sys.argv[1] + "/first", threads=1)  # loads what is loaded once
growths = []
for dense in (False, True):
    out = sys.argv[1] + f"/parts{dense}"
    schedule = make_schedule(make_plan(recipe, 2**63, decomposition=Decomposition(0 if dense else None)), 1)
    start()
    decompose_checkpoints(recipe, out, dense_above=0 if dense else None, threads=1)
    growths.append(growth()); allowed.append(schedule.read_bytes + schedule.work_bytes)
    config = from_parts(recipe, out)
    schedule = make_schedule(make_plan(config, 2**63), 1)
    start()
    merge_checkpoints(config, sys.argv[1] + f"/out{dense}", threads=1)
    growths.append(growth()); allowed.append(schedule.read_bytes + schedule.work_bytes)
report(growths=growths, allowed=allowed)
""",
        str(tmp_path),
    )
    for grown, allowed in zip(found["growths"], found["allowed"], strict=True):
        assert grown <= allowed + (24 << 20), found


def test_parts_serve_many_merges(tmp_path):
    """Every merge gives the bytes of the first with its weights."""
    paths, _, _ = family(tmp_path / "in", tasks=3)
    recipe = MergeConfig("tsvm", base_model=paths[0], models=paths[1:])
    decompose_checkpoints(recipe, tmp_path / "parts")
    found = []
    for number in range(4):
        asked = MergeConfig("tsvm", base_model=paths[0], models=paths[1:], weight=[1.0, number % 2, 0.5])
        merge_checkpoints(from_parts(asked, tmp_path / "parts"), tmp_path / f"out{number}")
        found.append((tmp_path / f"out{number}" / "model.safetensors").read_bytes())
    assert found[0] == found[2] != found[1] == found[3]
