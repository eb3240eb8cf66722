import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from checkpoints import digest, family, save
from compare import same_bits
from safetensors.torch import load_file, save_file

from r_tsvm_kernels import MergeConfig, __version__, merge_state_dicts
from r_tsvm_kernels.cli import main

RECIPE = """
merge_method: task_arithmetic
base_model: in/base
models:
  - model: in/expert0
    parameters: {weight: 0.3}
  - model: in/expert1
parameters: {lambda: 0.5}
"""


def run(capsys, *arguments):
    """Run the command in this process; return exit code, stdout and stderr."""
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    return code, out, err


def flags(paths):
    base, *tuned = paths
    return ["--base", base, *(item for path in tuned for item in ("--model", path))]


def test_merge_by_flags(tmp_path, capsys):
    paths, base, tuned = family(tmp_path / "in", dtype=torch.bfloat16)
    code, out, err = run(
        capsys, "merge", *flags(paths), "--weight", 0.5, "--weight", 2, "--method", "rtsvm",
        "--set", "density=0.5", "--set", "outlier_weighting=damp", "--set", "alpha=[0.2, 0.6]",
        "--exclude", "*norm*", "--out-dtype", "float32", tmp_path / "out",
    )  # fmt: skip
    assert code == 0
    assert f"R-TSVM: {len(base)} tensors" in out and str(tmp_path / "out") in out
    assert f"{len(base)}/{len(base)} tensors" in err  # plain progress lines, as this is no terminal
    measured = json.loads((tmp_path / "out" / "merge_report.json").read_text())["summary"]["interference"]
    assert (
        f"interference: {round(measured, 2) + 0.0:.2f} on average (0: independent tasks, 1: the same subspaces)\n"
        in out
    )
    config = MergeConfig(
        merge_method="rtsvm",
        models=({"parameters": {"weight": 0.5}}, {"parameters": {"weight": 2}}),
        parameters={"density": 0.5, "outlier_weighting": "damp", "alpha": [0.2, 0.6]},
        exclude=("*norm*",),
        out_dtype="float32",
    )
    expected = merge_state_dicts(base, tuned, config).state_dict
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert all(same_bits(merged[name], tensor) for name, tensor in expected.items())


def test_merge_by_recipe(tmp_path, capsys, monkeypatch):
    family(tmp_path / "in")
    monkeypatch.chdir(tmp_path)  # model paths of a recipe are relative to where the command runs
    (tmp_path / "r.yaml").write_text(RECIPE)
    assert run(capsys, "merge", "r.yaml", "one", "--quiet") == (0, "", "")
    flags = ["--base", "in/base", "--model", "in/expert0", "--weight", "0.3", "--model", "in/expert1", "--weight", "1"]
    options = ["--method", "task_arithmetic", "--set", "lambda=0.5", "--quiet"]
    assert run(capsys, "merge", *flags, *options, "two")[0] == 0
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "two/model.safetensors").read_bytes()
    assert run(capsys, "merge", "r.yaml", "three", "--set", "lambda=1", "--dtype", "bfloat16", "--quiet")[0] == 0
    assert load_file(tmp_path / "three/model.safetensors")["scale"].dtype == torch.bfloat16


def test_the_recipe_that_is_written_repeats_the_merge(tmp_path, capsys):
    paths, _, _ = family(tmp_path / "in")
    run(capsys, "merge", *flags(paths), "--set", "rank=3", tmp_path / "a")
    assert run(capsys, "merge", tmp_path / "a" / "merge_recipe.yaml", tmp_path / "b")[0] == 0
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_info(capsys):
    code, out, _ = run(capsys, "info")
    assert code == 0
    for words in (__version__, torch.__version__, "task_statistics", "rtsvm"):
        assert words in out
    facts = json.loads(run(capsys, "info", "--json")[1])
    assert facts["backends"]["torch"] == "ready"
    assert facts["methods"]["rtsvm"]["parameters"]["outlier_sigma"]["default"] == 3.0


def test_version(capsys):
    assert run(capsys, "--version")[:2] == (0, f"rtsvm {__version__}\n")


# --- mistakes: exit code 2 (wrong use) or 1 (failure), one line that says what to do, nothing written ----------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["merge"], "required"),
        (["merge", "out"], "nothing to merge"),
        (["merge", "recipe.yaml"], "no output: name a folder after the recipe, as in `rtsvm merge recipe.yaml OUT`"),
        (["merge", "{base}", "{m}", "extra", "out"], "expected [RECIPE.yaml] OUT"),
        (["merge", "--base", "{base}", "--model", "{m}", "recipe.yaml", "out"], "not both"),
        (
            ["merge", "--base", "{base}", "--model", "{m}", "--weight", "1", "--weight", "2", "out"],
            "--weight: expected one for each --model (1), got 2",
        ),
        (["merge", "--base", "{base}", "--model", "{m}", "--method", "tsmv", "out"], "did you mean 'tsvm'"),
        (["merge", "--base", "{base}", "--model", "{m}", "--set", "densty=1", "out"], "did you mean 'density'"),
        (["merge", "--base", "{base}", "--model", "{m}", "--set", "density", "out"], "KEY=VALUE"),
        (["merge", "--base", "{base}", "--model", "{m}", "--set", "density=[", "out"], "not a valid value"),
        (["merge", "--base", "{base}", "--model", "{m}", "--set", "density=7", "out"], "less than or equal to 1"),
        (["merge", "--base", "{base}", "--model", "{m}", "--device", "cuda:7", "out"], "torch sees"),
        (["merge", "--base", "{base}", "--model", "{m}", "--device", "x", "out"], "device must be"),
        (["merge", "--base", "{base}", "--model", "{m}", "--dtype", "int8", "out"], "invalid choice"),
        (
            ["merge", "--base", "{base}", "--model", "{m}", "--shard-size", "x", "out"],
            "argument --shard-size: expected a size such as",
        ),
        (["merge", "--base", "{base}", "--model", "{m}", "--threads", "0", "out"], "threads"),
        (["merge", "--base", "{base}", "--model", "{m}", "{base}"], "already in use"),
        (["merge", "--base", "{base}", "--model", "{m}", "--resume", "--restart", "out"], "not allowed with"),
        (["merge", "--base", "{base}", "--model", "{m}", "--memory", "1MB", "out"], "memory budget of at least"),
        (
            ["merge", "--base", "{base}", "--model", "{m}", "--memory", "lots", "out"],
            "argument --memory: expected a size",
        ),
        (
            ["merge", "--base", "{base}", "--models", "{m}", "out"],
            "unrecognized arguments: --models; did you mean --model?",
        ),
        (["merge", "--base", "{base}", "--model", "{m}", "--engine", "spark", "out"], "choose from"),
        (
            ["merge", "--base", "{base}", "--model", "{m}", "--backend", "rocm", "out"],
            "no backend 'rocm'; expected one of",
        ),
        (["merge", "--base", "{base}", "--model", "{m}", "--backend", "ties=cpu", "out"], "no op 'ties'"),
        (
            ["merge", "--base", "{base}", "--model", "{m}", "--backend", "cuda", "out", "--device", "cpu"],
            "cannot run on cpu",
        ),
        (
            ["merge", "--base", "{base}", "--model", "{m}", "--backend", "cpu", "--backend", "torch", "out"],
            "one backend for",
        ),
        (["merge", "--base", "{base}", "--model", "{m}", "--method", "nuslerp", "out"], "nuslerp takes 2 models"),
        (["merge", "--base", "{base}", "--model", "{m}", "--method", "nearswop", "out"], "did you mean 'nearswap'"),
        (["merge", "{base}", "out"], "is not a recipe file; name models with --base and --model"),
        (["merge", "--model", "{m}", "out"], "needs base_model"),
        (["merge", "missing.yaml", "out"], "cannot read the recipe"),
        (["merge", "--base", "{pickle}", "--model", "{m}", "out"], "pickle"),
    ],
    ids=str,
)
def test_wrong_use(tmp_path, capsys, monkeypatch, arguments, message):
    paths, _, _ = family(tmp_path / "in")
    (tmp_path / "pickle").mkdir()
    torch.save({}, tmp_path / "pickle" / "pytorch_model.bin")
    monkeypatch.chdir(tmp_path)
    before = digest(tmp_path)
    places = {"base": paths[0], "m": paths[1], "pickle": tmp_path / "pickle"}
    code, out, err = run(capsys, *(argument.format(**places) for argument in arguments))
    assert (code, out) == (2, "")
    assert message in err and "Traceback" not in err
    assert digest(tmp_path) == before


def break_truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-20])


def break_nan(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][2] = torch.nan
    save_file(tensors, folder / "model.safetensors")


def break_shape(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(17)
    save_file(tensors, folder / "model.safetensors")


def break_missing(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors")


def break_index(entry):
    def change(folder):
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"scale": entry}}))

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_truncate, "truncated?"),
        (break_nan, "model.norm.weight of"),
        (break_shape, "has shape (17,)"),
        (break_missing, "1 missing (model.norm.weight)"),
        (break_index("gone.safetensors"), "names gone.safetensors, which is missing"),
        (break_index("../expert1/model.safetensors"), "not a file name inside this folder"),
    ],
    ids=["truncated", "nan", "shape", "missing", "index-missing", "index-outside"],
)
def test_failures(tmp_path, capsys, damage, message):
    paths, _, _ = family(tmp_path / "in", shards=(1,))
    damage(paths[1])
    before = digest(tmp_path / "in")
    code, _, err = run(capsys, "merge", *flags(paths), tmp_path / "out")
    assert code == 1
    assert message in err and str(paths[1]) in err and "Traceback" not in err
    assert digest(tmp_path / "in") == before
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_there(tmp_path, capsys):
    code, _, err = run(capsys, "merge", "--base", "./none", "--model", "./nothing", tmp_path / "out")
    assert code == 1 and "none: no such folder or file" in err and "Repo id" not in err


def test_a_stopped_command_that_wrote_nothing_says_so(tmp_path, capsys, monkeypatch):
    paths, _, _ = family(tmp_path / "in")
    before = signal.getsignal(signal.SIGTERM)
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):

        def stop(*_, number=number, **__):
            signal.raise_signal(number)

        monkeypatch.setattr("r_tsvm_kernels.engine.merge_checkpoints", stop)
        assert run(capsys, "merge", *flags(paths), tmp_path / "out") == (
            code, "", "rtsvm merge: stopped; nothing was written\n",
        )  # fmt: skip
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_extra_tensor(tmp_path, capsys):
    paths, _, tuned = family(tmp_path / "in", shards=(1,))
    odd = save(tmp_path / "odd", tuned[0] | {"more": torch.ones(2)})
    code, _, err = run(capsys, "merge", *flags([*paths, odd]), tmp_path / "out")
    assert code == 1 and "1 extra (more)" in err
    assert not (tmp_path / "out").exists()


# --- as a process --------------------------------------------------------------------------------------------------


def test_module_and_command_are_the_same():
    module = subprocess.run(
        [sys.executable, "-m", "r_tsvm_kernels", "--help"], capture_output=True, text=True, check=True
    )
    script = os.path.join(os.path.dirname(sys.executable), "rtsvm")  # noqa: PTH118, PTH120
    command = subprocess.run([script, "--help"], capture_output=True, text=True, check=True)
    assert module.stdout == command.stdout and "merge models into one" in module.stdout


def test_help_is_quick():
    times = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "r_tsvm_kernels", "merge", "--help"], capture_output=True, check=True)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.5


def test_progress_bar_on_a_terminal(tmp_path):
    import pty  # not on every system, and no other test needs it

    base = {f"layers.{i}.[/b]:smile:[red]": torch.full((4, 4), float(i)) for i in range(3)}  # no markup, but names
    tuned = {name: tensor + 1 for name, tensor in base.items()}
    paths = [save(tmp_path / "base[/b]", base), save(tmp_path / "tuned", tuned)]
    parent, child = pty.openpty()
    command = [sys.executable, "-m", "r_tsvm_kernels", "merge", *map(str, flags(paths)), str(tmp_path / "out")]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "120"}
    seen = b""
    with subprocess.Popen(command, stderr=child, stdout=subprocess.DEVNULL, env=environment) as process:
        os.close(child)
        with contextlib.suppress(OSError):  # the terminal hangs up when the process ends
            while part := os.read(parent, 4096):
                seen += part
    os.close(parent)
    assert process.returncode == 0
    assert f"{len(base)}/{len(base)} tensors".encode() in seen and "━".encode() in seen
    assert b"layers.2.[/b]:smile:[red]" in seen and b"not shown any more" not in seen


def test_a_pipe_that_closes_early(tmp_path):
    paths, _, _ = family(tmp_path / "in")
    command = [sys.executable, "-m", "r_tsvm_kernels", "inspect", *map(str, flags(paths))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert "Traceback" not in process.stderr.read()
