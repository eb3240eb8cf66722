"""Places of outputs: no file or link of others is overwritten, followed or emptied, and published outputs are
complete."""

import json
import os
from pathlib import Path

import pytest
from checkpoints import digest, family

from r_tsvm_kernels import (
    CheckpointError,
    ConfigError,
    JournalError,
    MergeConfig,
    OutputExistsError,
    OutputUnfinishedError,
    merge_checkpoints,
    verify_output,
)
from r_tsvm_kernels.cli import main
from r_tsvm_kernels.engine import job, output, write_page
from r_tsvm_kernels.engine.lines import as_line
from r_tsvm_kernels.lora_tools import extract_lora

BESIDE = ("merge_report.json", "merge_report.html", "merge_journal.jsonl")


def config_for(paths, method="task_arithmetic"):
    base, *tuned = (str(path) for path in paths)
    return MergeConfig(merge_method=method, base_model=base, models=tuple({"model": m} for m in tuned))


def make(kind, place, precious):
    """Put a file, folder or link of another program at a place."""
    place.parent.mkdir(exist_ok=True)
    match kind:
        case "file":
            place.write_text("theirs")
        case "link":
            place.symlink_to(precious)
        case "hard-link":
            os.link(precious, place)
        case "dangling":
            place.symlink_to("nowhere")
        case "folder":
            place.mkdir()
        case "pipe":
            os.mkfifo(place)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("name", BESIDE)
@pytest.mark.parametrize("kind", ["file", "link", "hard-link", "dangling", "folder", "pipe"])
def test_what_lies_beside_a_single_file_is_left_alone(tmp_path, capsys, name, kind):
    paths, _, _ = family(tmp_path / "in", shards=(1,))
    place = tmp_path / "out" / f"o.{name}"
    make(kind, place, paths[0] / "model.safetensors")
    before, beside = digest(tmp_path / "in"), place.lstat()
    out = tmp_path / "out" / "o.safetensors"
    command = ["merge", "--base", paths[0], "--model", paths[1], out]
    assert main([str(item) for item in command]) == 2
    assert f"o.{name}: already in use" in capsys.readouterr().err
    assert digest(tmp_path / "in") == before and place.lstat() == beside and names(tmp_path / "out") == [place.name]


@pytest.mark.parametrize("links", [True, False], ids=["links", "no-links"])
@pytest.mark.parametrize("name", [*BESIDE, "safetensors"])
def test_what_appears_during_a_merge_is_left_alone(tmp_path, monkeypatch, name, links):
    paths, _, _ = family(tmp_path / "in")
    config, out = config_for(paths), tmp_path / "out" / "o.safetensors"
    whole = merge_checkpoints(config, tmp_path / "whole.safetensors")
    if not links:
        monkeypatch.setattr(os, "link", _refuse_links)
    place = tmp_path / "out" / f"o.{name}"
    with monkeypatch.context() as patch:
        # As late as can be: when the places were looked at for the last time.
        patch.setattr(output, "sync_path", lambda path: place.exists() or place.write_text("theirs"))
        with pytest.raises(OutputExistsError, match=r"created by another process during the merge.*--resume"):
            merge_checkpoints(config, out)
    assert names(tmp_path / "out") == [".o.safetensors.partial", place.name] and place.read_text() == "theirs"
    place.unlink()
    merge_checkpoints(config, out, resume=True)
    assert out.read_bytes() == whole.path.read_bytes() and verify_output(out).ok
    assert names(tmp_path / "out") == sorted(f"o.{name}" for name in (*BESIDE, "safetensors"))


def _refuse_links(*_, **__):
    raise PermissionError(1, "Operation not permitted")


@pytest.mark.parametrize("out", ["out", "out.safetensors"])
def test_a_publication_that_fails_is_undone(tmp_path, monkeypatch, out):
    paths, _, _ = family(tmp_path / "in")
    whole = merge_checkpoints(config_for(paths), tmp_path / "whole" / out)
    sync = output.sync_path

    def fail(path):
        if path == tmp_path:
            raise OSError(5, "Input/output error")
        sync(path)

    with monkeypatch.context() as patch:
        patch.setattr(output, "sync_path", fail)
        with pytest.raises(CheckpointError, match=r"Input/output error.*10 of 10 tensors.*--resume"):
            merge_checkpoints(config_for(paths), tmp_path / out)
    assert names(tmp_path) == sorted([f".{out}.partial", "in", "whole"])
    result = merge_checkpoints(config_for(paths), tmp_path / out, resume=True)
    assert result.resumed == 10
    weights = "model.safetensors" if out == "out" else ""
    assert (result.path / weights).read_bytes() == (whole.path / weights).read_bytes()


@pytest.mark.parametrize("count", range(4))
def test_a_publication_that_is_killed_goes_on(tmp_path, monkeypatch, count):
    """Killed after so many of the four files of a single-file output."""
    paths, _, _ = family(tmp_path / "in")
    config, out = config_for(paths), tmp_path / "o.safetensors"
    whole = merge_checkpoints(config, tmp_path / "whole.safetensors")
    with monkeypatch.context() as patch:
        publish, calls = output.publish, iter(range(count))

        def killed(source, place):
            if next(calls, None) is None:
                patch.setattr(Path, "unlink", lambda *_, **__: None)  # a killed process undoes nothing
                raise KeyboardInterrupt
            publish(source, place)

        patch.setattr(output, "publish", killed)
        with pytest.raises(KeyboardInterrupt):
            merge_checkpoints(config, out)
    assert sum((tmp_path / f"o.{name}").exists() for name in BESIDE) == count
    with pytest.raises(OutputUnfinishedError):
        merge_checkpoints(config, out)
    merge_checkpoints(config, out, resume=True)
    assert out.read_bytes() == whole.path.read_bytes() and verify_output(out).ok
    assert not (tmp_path / ".o.safetensors.partial").exists()


def test_killed_or_stopped_when_all_is_published(tmp_path, monkeypatch):
    paths, _, _ = family(tmp_path / "in")
    config, out = config_for(paths), tmp_path / "o.safetensors"

    remove = output.Stage.remove

    def stop(stage):
        if stage.published:
            raise KeyboardInterrupt
        remove(stage)

    with monkeypatch.context() as patch:
        patch.setattr(output.Stage, "remove", stop)
        with pytest.raises(KeyboardInterrupt, match=r"o\.safetensors is complete$"):
            merge_checkpoints(config, out)
    assert (tmp_path / ".o.safetensors.partial").exists() and verify_output(out).ok
    with pytest.raises(OutputExistsError):
        merge_checkpoints(config, out, resume=True)
    assert not (tmp_path / ".o.safetensors.partial").exists() and verify_output(out).ok


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("kind", ["file", "link", "folder"])
def test_a_stage_of_somebody_else_is_not_emptied(tmp_path, kind, restart):
    paths, _, _ = family(tmp_path / "in")
    stage = tmp_path / ".out.partial"
    make(kind, stage, paths[0])
    if kind == "folder":
        (stage / "thesis.tex").write_text("theirs")
    before = digest(tmp_path)
    with pytest.raises(OutputUnfinishedError, match="holds no journal"):
        merge_checkpoints(config_for(paths), tmp_path / "out", restart=restart)
    with pytest.raises(OutputUnfinishedError, match="holds no journal"):
        extract_lora(str(paths[0]), str(paths[1]), tmp_path / "out")
    assert digest(tmp_path) == before


def test_what_a_command_without_a_journal_left_is_emptied(tmp_path):
    paths, _, _ = family(tmp_path / "in")
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "adapter_model.safetensors").write_text("half")
    extract_lora(str(paths[0]), str(paths[1]), tmp_path / "out")
    (tmp_path / ".next.partial").mkdir()
    merge_checkpoints(config_for(paths), tmp_path / "next")


@pytest.mark.parametrize(
    ("out", "error", "message"),
    [
        ("", ConfigError, "cannot be the name of an output"),
        ("new/..", ConfigError, "cannot be the name of an output"),
        ("n" * 300, ConfigError, "File name too long"),
        ("n" * 250, ConfigError, "File name too long"),  # there is no room for the name of the stage
        ("new/" + "n" * 300, ConfigError, "File name too long"),
        ("n" * 235 + ".safetensors", ConfigError, "File name too long"),
        ("a\0b", ConfigError, "null (byte|character)"),
        ("loop/out", ConfigError, "symbolic links"),
        ("loop", OutputExistsError, "already in use"),
        ("dangling", OutputExistsError, "already in use"),
        ("pipe", OutputExistsError, "already in use"),
        ("pipe.safetensors", OutputExistsError, "already in use"),
        ("/dev/null", OutputExistsError, "already in use"),
        ("folder.safetensors", OutputExistsError, "a folder"),
        ("file/out", CheckpointError, "Not a directory|File exists"),
    ],
    ids=lambda value: ascii(value)[:30],
)
def test_places_that_cannot_be_an_output(tmp_path, monkeypatch, out, error, message):
    paths, _, _ = family(tmp_path / "in")
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    for kind in ("dangling", "pipe", "file"):
        make(kind, tmp_path / kind, None)
    os.mkfifo("pipe.safetensors")
    Path("folder.safetensors").mkdir()
    before = names(tmp_path)
    with pytest.raises(error, match=message):
        merge_checkpoints(config_for(paths), out)
    if not out.endswith(".safetensors"):
        with pytest.raises(error, match=message):
            extract_lora(str(paths[0]), str(paths[1]), out)
    assert names(tmp_path) == before and not Path("/dev/.null.partial").exists()


@pytest.mark.parametrize("make_lock", [lambda lock: lock.write_text("theirs"), os.mkfifo])
def test_a_lock_file_of_somebody_else_is_left_alone(tmp_path, make_lock):
    paths, _, _ = family(tmp_path / "in")
    lock = tmp_path / ".out.partial.lock"
    make_lock(lock)
    before = names(tmp_path), lock.lstat()
    with pytest.raises(OutputExistsError, match="not the lock of a merge"):
        merge_checkpoints(config_for(paths), tmp_path / "out")
    assert (names(tmp_path), lock.lstat()) == before
    lock.unlink()
    lock.touch()  # as a merge that was killed leaves it
    merge_checkpoints(config_for(paths), tmp_path / "out")
    assert not lock.exists()


def test_links_in_the_stage_are_not_followed(tmp_path, monkeypatch):
    paths, _, _ = family(tmp_path / "in", shards=(1,))
    config, precious = config_for(paths), paths[0] / "model.safetensors"
    before = digest(tmp_path / "in")
    lock = tmp_path / ".out.partial.lock"
    lock.symlink_to(tmp_path / "new")
    with pytest.raises(CheckpointError, match="symbolic links"):
        merge_checkpoints(config, tmp_path / "out")
    lock.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(output.Stage, "publish", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            merge_checkpoints(config, tmp_path / "out")
    stage = tmp_path / ".out.partial"
    for name in ("merge_report.json", "merge_report.html", "README.md", "merge_recipe.yaml"):
        (stage / name).unlink()
        (stage / name).symlink_to(precious)
    merge_checkpoints(config, tmp_path / "out", resume=True)
    assert digest(tmp_path / "in") == before and not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    page = tmp_path / "out" / "merge_report.html"
    text = page.read_text()
    page.unlink()
    page.symlink_to(precious)
    write_page(tmp_path / "out")
    assert digest(tmp_path / "in") == before and page.read_text() == text and not page.is_symlink()
    assert not (tmp_path / "new").exists()


def without_certificate(entry):
    del entry["report"]["certificate"]["route"]


def other_name(entry):
    entry["name"] = "nope"


def other_place(entry):
    entry["stored"][0]["offset"] += 4


@pytest.mark.parametrize(
    "forge",
    [
        without_certificate,
        other_name,
        other_place,
        lambda entry: entry.update(name=5),
        lambda entry: entry["stored"][0].update(offset="x"),
        lambda entry: entry.update(inputs=None),
        lambda entry: entry.update(report=[]),
        lambda entry: entry.update(report={"certificate": None}),
        lambda entry: entry["stored"][0].update(dtype="float64"),
        lambda entry: entry["stored"][0].update(name="x"),
        lambda entry: entry.update(stored=[]),
        lambda entry: entry["report"].update(shape=[1]),
        lambda entry: entry["report"].update(shape="abc"),
        lambda entry: entry["report"].update(ranks={"a": 1}),
        lambda entry: entry["report"]["certificate"].update(error="x"),
        lambda entry: entry.pop("report"),
        lambda entry: entry.clear(),
    ],
)
def test_forged_journals(tmp_path, monkeypatch, capsys, forge):
    """Lines whose checksum is right, but that no merge would write."""
    monkeypatch.setattr(job, "COMMIT_SECONDS", 0.0)
    paths, _, _ = family(tmp_path / "in")
    config = config_for(paths, "rtsvm")
    with monkeypatch.context() as patch:
        patch.setattr(output.Stage, "publish", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            merge_checkpoints(config, tmp_path / "out")
    journal = tmp_path / ".out.partial" / "merge_journal.jsonl"
    lines = [json.loads(line) for line in journal.read_bytes().splitlines()]
    for line in lines:
        del line["line"]
    forge(next(line for line in lines[1:] if line["report"]["certificate"]))
    journal.write_bytes(b"".join(map(as_line, lines)))
    with pytest.raises(JournalError, match="restart"):
        merge_checkpoints(config, tmp_path / "out", resume=True)
    merge_checkpoints(config, tmp_path / "whole")
    (tmp_path / "whole" / "merge_journal.jsonl").write_bytes(journal.read_bytes())
    assert main(["verify", str(tmp_path / "whole")]) == 1  # refused, or what it names is not there
    assert "Traceback" not in capsys.readouterr().err
    merge_checkpoints(config, tmp_path / "out", restart=True)


@pytest.mark.parametrize(
    "fingerprint", [{}, {"models": 5}, {"models": []}, {"models": [1]}, {"models": ["a\0b", "n" * 300]}]
)
def test_a_forged_fingerprint(tmp_path, fingerprint):
    paths, _, _ = family(tmp_path / "in")
    merge_checkpoints(config_for(paths), tmp_path / "out")
    (tmp_path / "out" / "merge_journal.jsonl").write_bytes(as_line(fingerprint))
    with pytest.raises((JournalError, CheckpointError)):
        verify_output(tmp_path / "out", inputs=True)
