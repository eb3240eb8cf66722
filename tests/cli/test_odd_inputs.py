"""Something else than a file may be at its path: every command says so in one line, and none waits for it."""

import os
import shutil
import signal
import socket

import pytest
from checkpoints import digest, family

from r_tsvm_kernels import CheckpointError, InputChangedError
from r_tsvm_kernels.checkpoint import Checkpoint
from r_tsvm_kernels.cli import main

KINDS = ["pipe", "folder", "loop", "dangling", "device", "socket", "empty", "junk", "deep"]


@pytest.fixture(autouse=True)
def no_waiting():
    def late(*_):
        raise AssertionError("it waits, or never ends")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base, a fine-tune, an adapter and a finished merge."""
    folder = tmp_path_factory.mktemp("made")
    family(folder, tasks=1, shards=(1, 2))
    base, tuned = folder / "base", folder / "expert0"
    models = ["--base", str(base), "--model", str(tuned), "--quiet"]
    assert main(["extract-lora", *models, "--rank", "2", str(folder / "adapter")]) == 0
    assert main(["merge", *models, str(folder / "merged")]) == 0
    return folder


def put(kind, place):
    """Put something odd in the place of a file."""
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place)
    place.unlink(missing_ok=True)
    match kind:
        case "pipe":
            os.mkfifo(place)
        case "folder":
            place.mkdir()
        case "loop":
            place.symlink_to(place.name)
        case "dangling":
            place.symlink_to("nowhere")
        case "device":
            place.symlink_to("/dev/zero")
        case "socket":
            here = os.getcwd()  # noqa: PTH109
            os.chdir(place.parent)  # the path of a socket is short
            with socket.socket(socket.AF_UNIX) as server:
                server.bind(place.name)
            os.chdir(here)
        case "empty":
            place.write_bytes(b"")
        case "junk":
            place.write_bytes(b"\xff\x00{[[[")
        case "deep":
            place.write_text("[" * 200_000)


def refused(capsys, *arguments):
    """Run a command that must be refused in one line; return the line."""
    code = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert code in (1, 2), arguments
    assert out == "" and err.count("\n") == 1 and err.startswith(f"rtsvm {arguments[0]}: error: "), err
    return err


@pytest.mark.parametrize("kind", KINDS)
def test_in_the_place_of_weights_and_configurations(tmp_path, capsys, made, kind):
    models = {"base": made / "base", "expert0": made / "expert0", "adapter": made / "adapter"}
    for role, name in (
        ("base", "model.safetensors"),
        ("base", "config.json"),
        ("expert0", "model.safetensors.index.json"),
        ("adapter", "adapter_config.json"),
        ("adapter", "adapter_model.safetensors"),
    ):
        odd = shutil.copytree(made / role, tmp_path / name)
        put(kind, odd / name)
        base, tuned, adapter = (odd if place == role else path for place, path in models.items())
        commands = [["resize-lora", adapter, "--rank", "1"], ["merge-lora", "--adapter", adapter]]
        if role == "adapter":
            commands.append(["merge", "--base", base, "--model", f"{tuned}+{adapter}"])
        else:
            commands = [[command, "--base", base, "--model", tuned] for command in ("merge", "extract-lora")]
        if name == "config.json" and kind in ("dangling", "loop"):
            continue  # as if there were none, until companion files are copied
        for command in commands:
            assert str(odd) in refused(capsys, *command, "--quiet", tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize("kind", KINDS)
def test_in_the_place_of_a_recipe_a_model_and_results(tmp_path, capsys, made, kind):
    place, out = tmp_path / "odd", tmp_path / "out"
    put(kind, place)
    base, tuned = made / "base", made / "expert0"
    for command in (
        ["merge", place, out],
        ["inspect", place],
        ["merge", "--base", place, "--model", tuned, out],
        ["merge", "--base", base, "--model", place, out],
        ["merge", "--base", base, "--model", f"{tuned}+{place}", out],
        ["extract-lora", "--base", base, "--model", place, out],
        ["resize-lora", place, "--rank", "1", out],
        ["verify", place],
        ["report", place],
        ["bench", "--compare", place],
    ):
        line = refused(capsys, *command)
        assert "odd" in line or "a recipe is a mapping" in line
    assert not out.exists()


@pytest.mark.parametrize("kind", KINDS)
def test_in_the_place_of_files_of_an_output(tmp_path, capsys, made, kind):
    for name, command in (
        ("model.safetensors", "verify"),
        ("merge_journal.jsonl", "verify"),
        ("merge_report.json", "report"),
    ):
        odd = shutil.copytree(made / "merged", tmp_path / command / name[:9])
        put(kind, odd / name)
        assert str(odd) in refused(capsys, command, odd)


@pytest.mark.parametrize("kind", ["pipe", "folder", "loop", "device", "socket", "junk"])
def test_a_card_that_is_none_is_not_read(tmp_path, capsys, made, kind):
    base = shutil.copytree(made / "base", tmp_path / "base")
    put(kind, base / "README.md")
    assert main(["merge", "--base", str(base), "--model", str(made / "expert0"), str(tmp_path / "out")]) == 0
    assert digest(tmp_path / "out")["model.safetensors"] == digest(made / "merged")["model.safetensors"]


@pytest.mark.parametrize(
    "path", ["n" * 300, "folder/" + "n" * 300, "loop/x", "file/x", "a\0b", "n" * 300 + "+m"], ids=ascii
)
def test_paths_that_cannot_be(tmp_path, capsys, monkeypatch, made, path):
    monkeypatch.chdir(tmp_path)
    put("loop", tmp_path / "loop")
    (tmp_path / "file").touch()
    base, tuned = made / "base", made / "expert0"
    for command in (
        ["merge", path, "out"],
        ["merge", "--base", path, "--model", tuned, "out"],
        ["merge", "--base", base, "--model", path, "out"],
        ["extract-lora", "--base", base, "--model", path, "out"],
        ["resize-lora", path, "--rank", "1", "out"],
        ["merge-lora", "--adapter", path, "out"],
        ["verify", path],
        ["report", path],
        ["bench", "--compare", path],
    ):
        refused(capsys, *command)
    assert not (tmp_path / "out").exists()


def test_an_input_that_is_replaced_by_a_pipe(tmp_path, made):
    checkpoint = Checkpoint(shutil.copytree(made / "base", tmp_path / "base"))
    put("pipe", tmp_path / "base" / "model.safetensors")
    with pytest.raises(CheckpointError, match="a pipe, not a regular file"):
        checkpoint.load("model.norm.weight")
    with pytest.raises(InputChangedError):
        checkpoint.check_unchanged()
