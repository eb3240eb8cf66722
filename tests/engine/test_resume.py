"""Merges that are stopped, in any way, continue where they were and end with the same bytes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from checkpoints import digest, family, save
from safetensors.torch import save_file

from r_tsvm_kernels import (
    CheckpointError,
    ConfigError,
    InputChangedError,
    JournalError,
    MergeConfig,
    NonFiniteError,
    OutputBusyError,
    OutputExistsError,
    OutputUnfinishedError,
    ResumeRefusedError,
    merge_checkpoints,
    verify_output,
)
from r_tsvm_kernels.engine import job, local, tiles
from r_tsvm_kernels.engine.output import Stage

# The command, with a journal that is written after each tensor.
EAGER = "import sys; from r_tsvm_kernels.engine import job; job.COMMIT_SECONDS = 0; "
EAGER += "from r_tsvm_kernels.cli import main; sys.exit(main(sys.argv[1:]))"


@pytest.fixture(autouse=True)
def eager_journal(monkeypatch):
    monkeypatch.setattr(job, "COMMIT_SECONDS", 0.0)


def config_for(paths, method="rtsvm", **fields):
    base, *tuned = (str(path) for path in paths)
    return MergeConfig(merge_method=method, base_model=base, models=tuple({"model": m} for m in tuned), **fields)


def weights(folder):
    """Digest of what must not depend on how a merge was run: all but the times of the report and of the journal."""
    return {name: hash for name, hash in digest(folder).items() if "report" not in name and "journal" not in name}


def many(folder, tensors=60, side=48):
    """Base and one fine-tune with many tensors."""
    generator = torch.Generator().manual_seed(0)
    paths = []
    for name in ("base", "tuned"):
        values = {f"layers.{i}.weight": torch.randn(side, side, generator=generator) for i in range(tensors)}
        paths.append(save(folder / name, values, shards=3))
    return paths


def stopped(tmp_path, out="out", count=3):
    """Start a merge that stops after some tensors; return its config."""
    paths, _, _ = family(tmp_path / "in")
    config = config_for(paths)
    left = iter(range(count))

    def merge_tile(*arguments):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return tiles.merge_tile(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local, "merge_tile", merge_tile)
        with pytest.raises(KeyboardInterrupt, match=f"{count} of 10 tensors are finished: run again with --resume"):
            merge_checkpoints(config, tmp_path / out, shard_size=3000, threads=1)
    assert not (tmp_path / out).exists()
    return config


def hidden(folder):
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


# --- as processes ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_kill_9_at_random_points(tmp_path):
    many(tmp_path, tensors=40, side=24)
    program = [sys.executable, str(Path(__file__).with_name("kill_and_resume.py")), str(tmp_path), "20", "5"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(program, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["codes"] == [0, 0, 0]
    expected = weights(tmp_path / "whole0")
    assert len(expected) > 5 and weights(tmp_path / "whole1") == expected
    for number, end in enumerate(facts["rounds"]):
        out = tmp_path / f"killed{number}"
        # Where the merge was complete before it could be killed, there is nothing to resume.
        assert end["code"] == 0 or (None in end["journaled"] and end["code"] == 4), end
        assert weights(out) == expected and verify_output(out).ok, end
        assert end["leftovers"] in ([], [f".{out.name}.partial.lock"])
    killed = [
        count for end in facts["rounds"] for count, hit in zip(end["journaled"], end["killed"], strict=True) if hit
    ]
    assert len(killed) >= 20
    in_the_middle = [count for count in killed if count and count < 40]
    assert len(in_the_middle) >= 5, killed  # otherwise the moments were badly chosen, and the test shows little


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.exhaustive)]
)
def test_signals(tmp_path, number, code):
    paths = many(tmp_path / "in", tensors=250, side=64)
    models = ["--base", str(paths[0]), "--model", str(paths[1]), "--threads", "1", "--quiet"]
    command = [sys.executable, "-c", EAGER, "merge", *models]
    journal = tmp_path / ".out.partial" / "merge_journal.jsonl"
    with subprocess.Popen([*command, str(tmp_path / "out")], stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n") > 5):
            time.sleep(0.01)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert "tensors are finished: run again with --resume" in err and "Traceback" not in err
    assert not (tmp_path / "out").exists()
    assert hidden(tmp_path) == [".out.partial"]
    again = [*command, str(tmp_path / "out")]
    refused = subprocess.run(again, capture_output=True, text=True)
    assert refused.returncode == 2 and "--resume (resume=True) continues it, --restart" in refused.stderr
    assert subprocess.run([*again, "--resume"]).returncode == 0
    result = merge_checkpoints(config_for(paths), tmp_path / "whole")
    assert weights(tmp_path / "out") == weights(result.path)
    assert 5 <= json.loads((tmp_path / "out" / "merge_report.json").read_text())["resumed_tensors"] < 250
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("presses", [pytest.param(1, marks=pytest.mark.exhaustive), 2])
def test_a_long_decomposition_does_not_hold_up_the_end(tmp_path, presses):
    values = {"small": torch.ones(8, 8), **{f"w{i}": torch.randn(3000, 3000) for i in range(2)}}
    base = save(tmp_path / "base", values)
    tuned = save(tmp_path / "tuned", {name: tensor + torch.randn(tensor.shape) for name, tensor in values.items()})
    command = [sys.executable, "-c", EAGER, "merge", "--base", str(base), "--model", str(tuned), "--quiet"]
    command += ["--threads", "1", str(tmp_path / "out")]
    journal = tmp_path / ".out.partial" / "merge_journal.jsonl"
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n") == 2):
            time.sleep(0.01)
        time.sleep(1.0)  # now it computes
        for _ in range(presses):
            process.send_signal(signal.SIGINT)
            time.sleep(0.2)
        start = time.monotonic()
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "1 of 3 tensors are finished: run again with --resume" in err
    assert time.monotonic() - start < 10


@pytest.mark.exhaustive  # the next test says the same within a process
def test_two_merges_at_once(tmp_path):
    paths = many(tmp_path / "in", tensors=100)
    command = [sys.executable, "-m", "r_tsvm_kernels", "merge", "--base", str(paths[0]), "--model", str(paths[1])]
    started = [subprocess.Popen([*command, str(tmp_path / "out")], stderr=subprocess.PIPE, text=True) for _ in range(3)]
    errors = [process.communicate(timeout=120)[1] for process in started]
    assert sorted(process.returncode for process in started) == [0, 2, 2]
    for process, error in zip(started, errors, strict=True):
        assert process.returncode == 0 or "another merge into this output is running" in error or "in use" in error
    assert verify_output(tmp_path / "out").ok
    assert hidden(tmp_path) == []


# --- in this process ------------------------------------------------------------------------------------------------


def test_a_second_merge_waits_outside(tmp_path):
    paths, _, _ = family(tmp_path / "in")
    seen = []

    def meanwhile(state):
        for options in ({}, {"resume": True}, {"restart": True}):
            with pytest.raises(OutputBusyError, match="another merge into this output is running"):
                merge_checkpoints(config_for(paths), tmp_path / "out", **options)
        seen.append(state)

    merge_checkpoints(config_for(paths), tmp_path / "out", progress=meanwhile)
    assert len(seen) == 10 and verify_output(tmp_path / "out").ok


@pytest.mark.parametrize("out", ["out", "out.safetensors"])
def test_resume_gives_the_same_bytes(tmp_path, out):
    config = stopped(tmp_path, out)
    seen = []
    result = merge_checkpoints(config, tmp_path / out, resume=True, progress=seen.append, shard_size=3000)
    assert result.resumed == 3 and len(seen) == 7
    assert seen[0].tensors_done == 4
    assert (seen[-1].tensors_done, seen[-1].bytes_done) == (10, seen[-1].bytes_total)
    whole = merge_checkpoints(config, tmp_path / "whole" / out, shard_size=3000)
    for report in (*result.reports.values(), *whole.reports.values()):
        assert report.seconds == report.stages.get("merge", [0.0])[0] and {"read", "write"} <= report.stages.keys()
        report.seconds, report.stages = 0.0, {}
    assert result.reports == whole.reports and list(result.reports) == list(whole.reports)
    if out == "out":
        assert weights(tmp_path / "out") == weights(whole.path)
    else:
        assert result.path.read_bytes() == whole.path.read_bytes()
    assert verify_output(result.path, inputs=True).ok
    assert hidden(tmp_path) == []


def test_an_interrupt_in_the_callback_stops_the_merge(tmp_path):
    paths, _, _ = family(tmp_path / "in")

    def interrupt(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="of 10 tensors are finished"):
        merge_checkpoints(config_for(paths), tmp_path / "out", progress=interrupt)
    assert not (tmp_path / "out").exists()
    assert "rtsvm-merge" not in [thread.name for thread in threading.enumerate()]
    assert merge_checkpoints(config_for(paths), tmp_path / "out", resume=True).resumed > 0


def test_resume_without_anything_to_resume_just_merges(tmp_path):
    paths, _, _ = family(tmp_path / "in")
    assert merge_checkpoints(config_for(paths), tmp_path / "out", resume=True).resumed == 0
    with pytest.raises(OutputExistsError):
        merge_checkpoints(config_for(paths), tmp_path / "out", resume=True)


def test_what_a_stopped_merge_left_is_not_touched_unasked(tmp_path):
    config = stopped(tmp_path)
    before = digest(tmp_path)
    with pytest.raises(OutputUnfinishedError, match=r"--resume .* continues it, --restart .* starts over"):
        merge_checkpoints(config, tmp_path / "out", shard_size=3000)
    assert digest(tmp_path) == before
    assert merge_checkpoints(config, tmp_path / "out", restart=True).resumed == 0
    assert hidden(tmp_path) == []


def test_an_error_keeps_what_is_finished(tmp_path):
    paths, _, tuned = family(tmp_path / "in", shards=(1,))
    tuned[1]["model.norm.weight"][3] = torch.nan
    save_file(tuned[1], paths[2] / "model.safetensors")
    with pytest.raises(NonFiniteError, match=r"model\.norm\.weight of .*: 1 of 16 .* run again with --resume"):
        merge_checkpoints(config_for(paths), tmp_path / "out", threads=1)
    result = merge_checkpoints(config_for(paths, exclude=("model.norm.weight",)), tmp_path / "out", restart=True)
    assert result.resumed == 0


def test_an_error_in_the_first_tensor_leaves_nothing(tmp_path):
    models = [
        save(tmp_path / name, {"w": torch.tensor([[1.0, value]])}) for name, value in {"a": 1.0, "b": torch.inf}.items()
    ]
    with pytest.raises(NonFiniteError) as caught:
        merge_checkpoints(config_for(models, "linear"), tmp_path / "out")
    assert "resume" not in str(caught.value)
    assert hidden(tmp_path) == []


def test_an_output_that_appears_meanwhile_is_kept(tmp_path):
    paths, _, _ = family(tmp_path / "in")

    def meanwhile(state):
        if state.tensors_done == 3:
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "first.txt").write_text("the other merge was faster")

    with pytest.raises(OutputExistsError, match="10 of 10 tensors are finished"):
        merge_checkpoints(config_for(paths), tmp_path / "out", progress=meanwhile)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["first.txt"]
    (tmp_path / "out" / "first.txt").unlink()
    assert merge_checkpoints(config_for(paths), tmp_path / "out", resume=True).resumed == 10


# --- what changed meanwhile -----------------------------------------------------------------------------------------


def flip(file, position=-1):
    """Change one byte in place, and set the time of the change back."""
    before = file.stat()
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    with file.open("r+b") as stream:
        stream.write(data)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.model_copy(update={"parameters": {"alpha": 0.5}}), r"recipe: parameters was \{\}, is"),
        (lambda c: c.model_copy(update={"models": c.models[:1]}), "recipe: models was"),
    ],
    ids=["parameter", "model"],
)
def test_another_recipe_is_refused(tmp_path, change, message):
    config = stopped(tmp_path)
    before = digest(tmp_path)
    with pytest.raises(ResumeRefusedError, match=message):
        merge_checkpoints(change(config), tmp_path / "out", resume=True, shard_size=3000)
    assert digest(tmp_path) == before


def test_another_layout_is_refused(tmp_path):
    config = stopped(tmp_path)
    with pytest.raises(ResumeRefusedError, match=r"shards: model.* was .*, is"):
        merge_checkpoints(config, tmp_path / "out", resume=True, shard_size=5000)


def test_another_version_is_refused(tmp_path, monkeypatch):
    config = stopped(tmp_path)
    monkeypatch.setattr("r_tsvm_kernels.engine.fingerprint.__version__", "99")
    with pytest.raises(ResumeRefusedError, match=r"versions: r_tsvm_kernels was 0\.\d+\.\d+, is 99"):
        merge_checkpoints(config, tmp_path / "out", resume=True, shard_size=3000)


def test_a_byte_flipped_before_the_resumption_is_noticed(tmp_path):
    config = stopped(tmp_path)
    flip(tmp_path / "in" / "base" / "model.safetensors")
    with pytest.raises(ResumeRefusedError, match=r"the input .*base/model\.safetensors changed"):
        merge_checkpoints(config, tmp_path / "out", resume=True, shard_size=3000)


def cut(file):
    os.truncate(file, file.stat().st_size - 100)


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
def test_an_input_that_changes_during_the_merge_is_noticed(tmp_path, damage):
    paths, _, _ = family(tmp_path / "in", shards=(1,))
    planned = threading.Event()

    def progress(state):
        if not planned.is_set():
            planned.set()
            damage(paths[1] / "model.safetensors")

    # A file that is gone cannot even be read, unless all of it was read already.
    error, message = (
        (CheckpointError, "") if damage is Path.unlink else (InputChangedError, "changed since the merge was")
    )
    with pytest.raises(error, match=rf"expert0/model\.safetensors: {message}"):
        merge_checkpoints(config_for(paths), tmp_path / "out", progress=progress)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
def test_a_shard_that_was_damaged_meanwhile_is_done_again(tmp_path, damage):
    config = stopped(tmp_path, count=9)
    stage = tmp_path / ".out.partial"
    damage(min(stage.glob("*.safetensors")))
    result = merge_checkpoints(config, tmp_path / "out", resume=True, shard_size=3000)
    assert 0 < result.resumed < 9
    assert weights(tmp_path / "out") == weights(merge_checkpoints(config, tmp_path / "whole", shard_size=3000).path)
    assert verify_output(tmp_path / "out").ok


def test_what_a_killed_removal_leaves_is_known_to_be_of_a_merge(tmp_path, monkeypatch):
    config = stopped(tmp_path, count=5)
    stage, kept, removed, unlink = Stage(tmp_path / "out"), tmp_path / "kept", [], os.unlink
    shutil.copytree(stage.folder, kept)

    def recorded(path, **options):
        unlink(path, **options)
        removed.append(Path(path).name)

    monkeypatch.setattr(os, "unlink", recorded)
    stage.remove()
    monkeypatch.undo()
    assert len(removed) > 2 and removed[-1] == "merge_journal.jsonl" and not stage.folder.exists()
    shutil.copytree(kept, stage.folder)
    for name in removed[:2]:
        (stage.folder / name).unlink()
    merge_checkpoints(config, tmp_path / "out", resume=True, shard_size=3000)
    assert weights(tmp_path / "out") == weights(merge_checkpoints(config, tmp_path / "whole", shard_size=3000).path)


# --- the journal ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [1, 20, 400])
def test_a_torn_tail_is_cut_off(tmp_path, cut):
    config = stopped(tmp_path, count=5)
    journal = tmp_path / ".out.partial" / "merge_journal.jsonl"
    os.truncate(journal, journal.stat().st_size - cut)
    result = merge_checkpoints(config, tmp_path / "out", resume=True, shard_size=3000)
    assert 0 < result.resumed < 5
    assert verify_output(tmp_path / "out").ok


def test_damage_in_the_middle_is_an_error(tmp_path):
    config = stopped(tmp_path, count=5)
    journal = tmp_path / ".out.partial" / "merge_journal.jsonl"
    data = bytearray(journal.read_bytes())
    data[data.index(b"\n") + 40] ^= 1
    journal.write_bytes(data)
    for options in ({}, {"resume": True}):
        with pytest.raises(JournalError, match=r"line 2 is damaged; .*--restart"):
            merge_checkpoints(config, tmp_path / "out", shard_size=3000, **options)
    assert merge_checkpoints(config, tmp_path / "out", restart=True).resumed == 0


def test_resume_and_restart_exclude_each_other(tmp_path):
    with pytest.raises(ConfigError, match="choose one"):
        merge_checkpoints(MergeConfig(), tmp_path / "out", resume=True, restart=True)
