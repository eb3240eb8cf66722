"""A failure of stdout or stderr never stops a merge, and commands print text unchanged but harmless."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import digest, family, save

from r_tsvm_kernels.cli import main, progress


def flags(paths):
    base, *tuned = map(str, paths)
    return ["--base", base, *(item for path in tuned for item in ("--model", path))]


def shell(redirection, *arguments, **environment):
    """Run the command in a shell, with its streams redirected; both of them are recorded where they are left alone."""
    command = ["sh", "-c", f'"$@" {redirection}', "sh", sys.executable, "-m", "r_tsvm_kernels", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("streams")
    paths, _, _ = family(folder / "in")
    assert main(["merge", *flags(paths), str(folder / "out"), "--quiet"]) == 0
    return paths, digest(folder / "out")["model.safetensors"]


def some(*values, rest):
    """Parameters, of which the rest is left to `make test-all`: each starts processes that import torch."""
    return [*values, *(pytest.param(value, marks=pytest.mark.exhaustive) for value in rest)]


@pytest.mark.parametrize(
    "redirection",
    some(
        "<&- >&- 2>&-", ">/dev/full 2>/dev/full", "2>&1 | true",
        rest=["2>&-", ">&- 2>&-", ">/dev/full", "2>/dev/full"],
    ),
)  # fmt: skip
def test_a_merge_is_finished_whatever_becomes_of_its_streams(tmp_path, inputs, redirection):
    paths, expected = inputs
    done = shell(redirection, "merge", *flags(paths), tmp_path / "out")
    assert (done.returncode, "Traceback" in done.stderr, "Exception" in done.stderr) == (0, False, False)
    # A closed descriptor is the next file's: what is printed there must not end up in the weights.
    assert digest(tmp_path / "out")["model.safetensors"] == expected
    assert main(["verify", str(tmp_path / "out")]) == 0
    if ">&-" not in redirection and "/dev/full" not in redirection.partition("2>")[0] and "|" not in redirection:
        assert "-> " in done.stdout


@pytest.mark.parametrize("command", some("verify", rest=["inspect", "info"]))
def test_a_command_whose_result_is_what_it_prints_says_that_it_is_lost(tmp_path, inputs, command):
    paths, _ = inputs
    arguments = {"inspect": flags(paths), "verify": [tmp_path / "out"], "info": []}[command]
    if command == "verify":
        assert main(["merge", *flags(paths), str(tmp_path / "out"), "--quiet"]) == 0
    done = shell(">/dev/full", command, *arguments)
    assert done.returncode == 1
    assert done.stderr == f"rtsvm {command}: error: stdout cannot be written: No space left on device\n"
    done = shell(">&-", command, *arguments)  # a user who closes stdout may still want the exit code
    assert (done.returncode, done.stderr) == (0, "")


def test_help_on_a_broken_stream():
    assert shell(">/dev/full", "merge", "--help").returncode == 0


@pytest.mark.parametrize("redirection", some("2>&-", rest=["2>/dev/full"]))
def test_errors_on_broken_streams(tmp_path, redirection):
    assert shell(redirection, "merge", tmp_path / "out").returncode == 2


def test_paths_that_no_encoding_has(tmp_path, capfdbinary):
    """Paths that are not UTF-8, or hold escape sequences, are read, written, named in all reports, and printable."""
    names = [b"m\xffdel", b"a\x1b[2J\x07\nb", "größe [red]".encode(), b"[b]:smile:[link=x]"]
    paths, _, _ = family(tmp_path / "in", tasks=len(names) - 1)
    hostile = []
    for path, name in zip(paths, names, strict=True):
        hostile.append(os.path.join(os.fsencode(tmp_path / "in"), name))  # noqa: PTH118
        os.rename(path, hostile[-1])  # noqa: PTH104
    base, *tuned = hostile
    models = ["--base", base, *(item for path in tuned for item in ("--model", path))]
    ascii_only = os.environ | {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}

    def here(arguments):
        assert main([os.fsdecode(argument) for argument in arguments]) == 0
        return capfdbinary.readouterr()

    def in_ascii(arguments):
        command = [sys.executable, "-m", "r_tsvm_kernels", *arguments]
        done = subprocess.run(command, capture_output=True, env=ascii_only)
        assert done.returncode == 0, done.stderr
        return done.stdout, done.stderr

    weights = set()
    for name, run in ((b"o\xfet", here), (b"o\xfet.safetensors", here), (b"o\xfet-ascii", in_ascii)):
        out = os.path.join(os.fsencode(tmp_path / "out"), name)  # noqa: PTH118
        for arguments in (["merge", *models, out], ["verify", "--inputs", out], ["report", out]):
            out_stream, err_stream = run(arguments)
            shown = out_stream + err_stream
            assert b"o\\xfet" in out_stream and not any(bad in shown for bad in (b"\x1b", b"\x07", b"\xfe"))
        path = Path(os.fsdecode(out))
        weights.add((path if path.suffix == ".safetensors" else path / "model.safetensors").read_bytes())
    assert len(weights) == 1
    assert b"m\\xffdel" in here(["inspect", *models])[0].replace(b"\n", b"").replace(b" ", b"")
    for suffix, count in (("README.md", 2), ("recipe.yaml", 2), ("report.json", 3), ("report.html", 3)):
        assert len([path.read_text(encoding="utf-8") for path in (tmp_path / "out").rglob(f"*{suffix}")]) == count


def test_markup_in_names_is_no_markup(tmp_path, capsys):
    names = ["layers.1.w[/b]", "layers.1.[bold]x", "layers.1.[link=http://x]y", "layers.1.:smile:"]
    base = {name: torch.ones(4, 4) for name in names}
    paths = [save(tmp_path / "[/b]base", base), save(tmp_path / "m[red]", {k: v + 1 for k, v in base.items()})]
    assert main(["inspect", *flags(paths)]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in names) and "[/b]base" in "".join(shown.split())


def test_escape_sequences_in_messages(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["merge", "--devise\x1b[2J", "x"])
    assert main(["merge", "--base", "g/\x1b[2Jbase", "--model", "a\nb", str(tmp_path / "out")]) == 1
    (tmp_path / "r.yaml").write_text('merge_method: "\\e[2J"\n')
    assert main(["merge", str(tmp_path / "r.yaml"), str(tmp_path / "out")]) == 2
    shown = capsys.readouterr().err
    assert "\x1b" not in shown and shown.count("\\x1b[2J") == 3


@pytest.mark.parametrize("terminal", [True, False], ids=["bar", "lines"])
def test_a_display_that_fails_is_switched_off(tmp_path, capsys, monkeypatch, terminal):
    def fail(*_):
        raise ValueError("no bar")

    paths, _, _ = family(tmp_path / "in")
    display = progress._Bar if terminal else progress._PlainLines
    monkeypatch.setattr(display, "show", fail)
    monkeypatch.setattr(progress, "_PlainLines", display)  # whatever stderr is
    assert main(["merge", *flags(paths), str(tmp_path / "out")]) == 0
    shown = capsys.readouterr()
    assert shown.err.count("progress is not shown any more (ValueError: no bar)") == 1
    assert (tmp_path / "out" / "model.safetensors").exists() and "-> " in shown.out


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("can't start new thread"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"),
        OSError(5, "Input/output error", "x"),
    ],
    ids=ascii,
)
def test_what_the_system_refuses_is_one_line(tmp_path, capsys, monkeypatch, error):
    def refuse(*_, **__):
        raise error

    paths, _, _ = family(tmp_path / "in")
    monkeypatch.setattr("r_tsvm_kernels.engine.merge_checkpoints", refuse)
    assert main(["merge", *flags(paths), str(tmp_path / "out")]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("rtsvm merge: error: ") and shown.count("\n") == 1


def test_other_errors_keep_their_traceback(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("a mistake of ours")

    paths, _, _ = family(tmp_path / "in")
    monkeypatch.setattr("r_tsvm_kernels.engine.merge_checkpoints", fail)
    with pytest.raises(RuntimeError, match="mistake of ours"):
        main(["merge", *flags(paths), str(tmp_path / "out")])
