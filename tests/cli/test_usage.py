"""Help, usage, and what commands print for people."""

import json
import os
import re
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from checkpoints import family, save
from safetensors.torch import load_file, save_file

from r_tsvm_kernels import dispatch
from r_tsvm_kernels.cli import build_parser, kinds, main
from r_tsvm_kernels.methods import METHODS

COMMANDS = {
    "merge", "decompose", "inspect", "verify", "report", "extract-lora", "resize-lora", "merge-lora", "mergekit",
    "fusion-bench", "info", "selfcheck", "bench", "sweep", "push",
}  # fmt: skip


@pytest.fixture
def run(capsys):
    """Run the command line; return exit code, stdout and stderr."""

    def call(*arguments):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return call


def test_the_overview_has_every_command_in_its_group(run):
    code, bare, err = run()
    assert (code, err) == (0, "") and run("--help")[1] == bare
    listed = re.findall(r"^  ([a-z][a-z-]+) {2,}\S", bare, re.M)
    assert set(listed) == COMMANDS and len(listed) == len(COMMANDS)
    for title in ("merging:", "LoRA adapters:", "inside other tools:", "this machine:"):
        assert f"\n{title}\n" in bare


@pytest.mark.parametrize("command", sorted(COMMANDS - {"mergekit", "fusion-bench"}))
def test_an_unknown_option_prints_the_usage_of_its_command(run, command):
    code, out, err = run(command, *["x"] * (command not in ("info", "bench")), "--no-such-option")
    assert (code, out) == (2, "") and err.startswith(f"usage: rtsvm {command}")
    assert f"\nrtsvm {command}: error: " in err


@pytest.mark.parametrize("command", sorted(COMMANDS - {"mergekit", "fusion-bench"}))
def test_help_fits_a_terminal_of_80_columns(run, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = run(command, "--help")
    assert (code, err) == (0, "") and max(map(len, out.splitlines())) <= 80


def test_usage_lines_show_both_forms(run):
    assert run("merge", "--help")[1].startswith("usage: rtsvm merge [options] RECIPE.yaml OUT\n       rtsvm merge [opt")
    assert run("inspect", "--help")[1].startswith("usage: rtsvm inspect [options] RECIPE.yaml\n")
    for words in ("--engine {local,ray}", "torch, cpu, cuda, triton or cublas"):
        assert words in " ".join(run("merge", "--help")[1].split())


def test_commands_of_mergekit(run):
    code, out, _ = run("mergekit", "--help")
    assert code == 0 and "rtsvm mergekit {yaml,pytorch,multi,extract-lora}" in out
    for arguments in ([], ["yml"]):
        code, _, err = run("mergekit", *arguments)
        assert code == 2 and "expected one of yaml, pytorch, multi, extract-lora, got" in err


# --- info


def test_info_is_one_screen(run):
    code, out, _ = run("info")
    assert code == 0 and len(out.splitlines()) < 45 and max(map(len, out.splitlines())) <= 80
    for op, found in dispatch.ops().items():
        (line,) = [line for line in out.splitlines() if line.split()[:1] == [op]]
        for device, order in found.order.items():
            assert f"{device}: {', '.join(order)}" in line.replace("*", "")
    words = " ".join(out.split())
    assert all(method in words for method in METHODS)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_info_of_a_method(run, method):
    code, out, _ = run("info", method)
    assert code == 0 and METHODS[method].paper_url in out and "\nSource: " in out
    assert all(len(line) <= 80 or (line.startswith("  ") and " = " in line) for line in out.splitlines()[1:])
    for key in METHODS[method].parameters.model_fields:
        assert re.search(rf"^  {key}[/* ]", out, re.M)
    facts = json.loads(run("info", method, "--json")[1])
    assert facts["formula"] and facts["parameters"]["weight"] == {
        "default": 1.0, "help": "weight of each model", "aliases": [], "per_model": True,
    }  # fmt: skip


def test_info_knows_other_names(run):
    assert run("info", "ties_merging")[1].startswith("ties, also ties_merging: TIES, https://arxiv.org")
    assert "alpha/lambda" in run("info", "tsvm")[1]
    code, _, err = run("info", "tsmv")
    assert code == 2 and "did you mean 'tsvm'" in err


# --- merge, verify


def flags(paths):
    base, *tuned = paths
    return ["--base", base, *(item for path in tuned for item in ("--model", path))]


def kernels_of(folder):
    return json.loads((folder / "merge_report.json").read_text())["kernels"]


def test_backends_are_forced_and_recorded(run, tmp_path):
    paths, _, _ = family(tmp_path / "in")
    merge = ["merge", *flags(paths), "--method", "ties", "--quiet", "--threads", "2"]
    assert run(*merge, tmp_path / "auto")[0] == 0
    assert run(*merge, "--backend", "torch", tmp_path / "torch")[0] == 0
    assert run(*merge, "--backend", "torch", "--backend", "elect_and_sum=cpu", tmp_path / "both")[0] == 0
    auto, reference, both = (kernels_of(tmp_path / name) for name in ("auto", "torch", "both"))
    assert set(reference.values()) == {"torch"} and auto["elect_and_sum"] == "cpu"
    assert both == reference | {"elect_and_sum": "cpu"}
    assert json.loads(run("inspect", *merge[1:-3], "--backend", "torch", "--json")[1])["kernels"] == reference


def test_the_forced_kernel_is_the_one_that_runs(run, tmp_path, monkeypatch):
    paths, _, _ = family(tmp_path / "in")

    def refuse(*_, **__):
        raise AssertionError("the kernel ran")

    monkeypatch.setattr("r_tsvm_kernels.ops.elect_and_sum.cpu_kernel.run", refuse)
    merge = ["merge", *flags(paths), "--method", "ties", "--quiet", "--threads", "2"]
    assert run(*merge, "--backend", "elect_and_sum=torch", tmp_path / "out")[0] == 0
    with pytest.raises(AssertionError, match="the kernel ran"):
        main([str(item) for item in [*merge, tmp_path / "again"]])


def test_the_last_line_names_the_page_and_verify(run, tmp_path):
    paths, base, _ = family(tmp_path / "in", shards=(1,))
    out = tmp_path / "out"
    last = run("merge", *flags(paths), out)[1].splitlines()[-1]
    assert last == f"report: {out / 'merge_report.html'}; to check the files later: rtsvm verify {out}"
    assert (out / "merge_report.html").exists()
    count = f"{out}: {len(base)} tensors are as they were written"
    assert run("verify", out)[1] == f"{count}\n"
    assert run("verify", "--inputs", out)[1] == f"{count}; the inputs have not changed\n"
    changed = load_file(paths[1] / "model.safetensors") | {"scale": torch.tensor(9.0)}
    save_file(changed, paths[1] / "model.safetensors")
    assert run("verify", "--inputs", out)[1].endswith(f"{count}; the inputs have changed\n")
    for command in ("verify", "report"):
        code, _, err = run(command, tmp_path / "nothing")
        assert code == 1 and "nothing: no such folder or file; expected the output of a merge" in err


def test_no_bar_above_an_error(tmp_path):
    import pty  # not on every system

    paths, _, _ = family(tmp_path / "in")
    parent, child = pty.openpty()
    command = [sys.executable, "-m", "r_tsvm_kernels", "merge", *map(str, flags(paths)), str(paths[0])]
    with subprocess.Popen(command, stderr=child, env=os.environ | {"TERM": "xterm", "COLUMNS": "120"}) as process:
        os.close(child)
        seen = b""
        try:
            while part := os.read(parent, 4096):
                seen += part
        except OSError:  # the terminal hangs up when the process ends
            pass
    os.close(parent)
    assert process.returncode == 2
    erased = b"\x1b[2K"  # the line of the bar, before the error is printed
    assert b"reading headers" not in seen or erased in seen.rpartition(b"reading headers")[2]


# --- LoRA


def test_what_an_extraction_keeps_and_leaves_out(run, tmp_path):
    paths, _, _ = family(tmp_path / "in")
    extract = ["extract-lora", "--base", paths[0], "--model", paths[1]]
    lines = run(*extract, "--energy", "0.95", tmp_path / "lora")[1].splitlines()
    found = re.match(r"\d+ modules of ranks? \d+( to \d+)?, at least ([\d.]+) % of the energy of each, in ", lines[0])
    assert float(found[2]) >= 95 and lines[-1] == f"report: {tmp_path / 'lora' / 'lora_report.json'}"
    reasons = [line.partition(": ")[2] for line in lines if re.match(r"  [\d.]+ % in \d+ tensors?: ", line)]
    assert len(set(reasons)) == len(reasons) > 0 and any("--embed-lora" in reason for reason in reasons)
    code, _, err = run("merge-lora", "--adapter", "a", "--weight", "1", "--weight", "2", tmp_path / "out")
    assert code == 2 and "--weight: expected one for each --adapter (1), got 2" in err
    code, _, err = run(*extract, "--energy", "0.9", "--noise", tmp_path / "out")
    assert code == 2 and "energy or noise" in err


# --- inspect

RECIPE = """
merge_method: rtsvm
base_model: {0}
models:
- model: {1}
  parameters: {{weight: [0, 1]}}
- model: {2}
parameters:
  alpha: [0.5, 1.0]
  density: [{{filter: mlp, value: 0.25}}, {{value: 1.0}}]
"""
LAYERS = 32
PARTS = {
    "input_layernorm": (16,), "post_attention_layernorm": (16,), "mlp.up_proj": (24, 16), "mlp.down_proj": (16, 24),
    **{f"self_attn.{part}_proj": (16, 16) for part in "qkvo"},
}  # fmt: skip


@pytest.fixture
def llama(tmp_path):
    """A recipe for models with the names of a Llama of 32 layers."""
    shapes = {f"model.layers.{i}.{part}.weight": shape for i in range(LAYERS) for part, shape in PARTS.items()}
    shapes |= {"model.embed_tokens.weight": (40, 16), "model.norm.weight": (16,), "lm_head.weight": (40, 16)}
    models = [
        save(tmp_path / f"model{index}", {name: torch.zeros(shape).bfloat16() for name, shape in shapes.items()})
        for index in range(3)
    ]
    (tmp_path / "r.yaml").write_text(RECIPE.format(*models))
    return tmp_path / "r.yaml", shapes


@pytest.mark.parametrize("columns", [80, 120])
def test_a_model_in_one_screen(run, llama, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    recipe, shapes = llama
    code, out, _ = run("inspect", recipe)
    lines = out.splitlines()
    rows = [line.split() for line in lines if re.match(r" *\d+  ", line)]
    assert code == 0 and max(map(len, lines[1:])) <= columns and len(lines) < 45 and len(rows) == len(PARTS) + 3
    assert sum(int(row[0]) for row in rows) == len(shapes)
    for part, shape in PARTS.items():
        (row,) = [row for row in rows if row[1] == f"model.layers.0-31.{part}"]
        assert row[0] == str(LAYERS) and row[2] == "x".join(map(str, shape))
        assert row[3:-1] == (["rtsvm", "8"] if len(shape) == 2 else ["mean"])
    notes = {line.split()[1]: after.strip() for line, after in pairwise(lines) if line.split()}
    assert notes["model.layers.0-31.mlp.up_proj"] == "weight 0..1 / 1; alpha 0.5..1; density 0.25"
    assert notes["model.layers.0-31.self_attn.q_proj"] == "weight 0..1 / 1; alpha 0.5..1; density 1"
    assert notes["model.norm"] == "not a matrix; weight 0 / 1; alpha 0.5"
    common = " ".join(" ".join(lines[2:9]).split())
    assert "rank auto" in common and "outlier_weighting clip" in common


def test_every_tensor_on_request(run, llama, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    recipe, shapes = llama
    out = run("inspect", "--all", recipe)[1]
    assert all(f"  {name} " in out or name.startswith("model.layers") for name in shapes)
    assert sum(bool(re.match(r" *1  ", line)) for line in out.splitlines()) == len(shapes)
    plan = json.loads(run("inspect", "--json", recipe)[1])
    assert sorted(name for names in plan["kinds"].values() for name in names) == sorted(shapes)
    last = plan["tensors"][f"model.layers.{LAYERS - 1}.mlp.up_proj.weight"]["parameters"]
    assert last == {"weight": [1.0, 1.0], "alpha": 1.0, "density": [0.25, 0.25]}
    assert plan["parameters"]["alpha"] == [0.5, 1.0] and plan["model_parameters"][0] == {"weight": [0, 1]}


def test_names_of_kinds():
    experts = [f"layers.{i}.experts.{j}.w" for i in (0, 1, 3) for j in range(8)]
    assert kinds.label(experts) == "layers.0-1,3.experts.0-7.w"
    assert kinds.label(["a.b"]) == "a.b"
    assert kinds.label([f"l.{i}" for i in range(0, 20, 2)]) == "l.0,2,..,18"


def test_options_that_all_commands_with_a_merge_share():
    parser = build_parser()
    for command in (["merge", "a", "b"], ["inspect", "a"]):
        arguments = parser.parse_args([*command, "--backend", "cpu", "--backend", "task_gram=torch"])
        assert arguments.backend == ["cpu", "task_gram=torch"]
