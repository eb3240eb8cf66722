"""`rtsvm sweep` as a user calls it."""

import json
import re

import pytest
from checkpoints import family

from r_tsvm_kernels.cli import main

EVALUATE = "sh -c 'cksum < $0/model.safetensors | cut -d \" \" -f 1' {model}"


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    family(tmp_path / "in", shards=(1,))
    (tmp_path / "r.yaml").write_text(
        "merge_method: tsvm\nbase_model: in/base\nmodels: [{model: in/expert0}, {model: in/expert1}]\n"
    )

    def call(*arguments):
        try:
            code = main(["sweep", *arguments])
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return call


def test_from_the_plan_to_the_best(run, tmp_path):
    grids = ["--grid", "alpha=0.5:1.5:0.5", "--grid", "weight.expert1=0.5,1", "--grid", "mode=exact,fast"]
    code, out, err = run("r.yaml", "out", *grids, "--eval", EVALUATE, "--dry-run")
    assert (code, err) == (0, "") and not (tmp_path / "out").exists()
    assert out.splitlines()[:2] == [
        "TSV-Merge: 12 candidates: alpha (3) x weight.expert1 (2) x mode (2)",
        "free in shared parts: alpha, weight.expert1; not free: mode",
    ]
    assert len(re.findall(r"mode=\w+: parts, once: \S+ operations, \S+ read, \S+ of parts", out)) == 2
    assert out.count("6 candidates from it, each ") == 2

    code, out, err = run("r.yaml", "out", *grids, "--eval", EVALUATE)
    lines = err.splitlines()
    assert code == 0 and len(lines) == 12 and lines[0].startswith("1/12 alpha=0.5, weight.expert1=0.5, mode=exact: ")
    report = json.loads((tmp_path / "out" / "sweep.json").read_text())
    best = report["candidates"][report["best"] - 1]
    assert f"-> {'out/best'}" in out and f"alpha={best['values']['alpha']}" in out.splitlines()[-2]
    assert out.splitlines()[-1] == "report: out/sweep.html; its recipe: out/best.yaml"
    assert re.search(r"^  best +", out, re.M) and len(re.findall(r"^ .* m?s *$", out, re.M)) == 12

    code, out, err = run("r.yaml", "out", *grids, "--eval", EVALUATE, "--quiet")
    assert (code, out, err) == (0, "", "")
    code, out, err = run("r.yaml", "out", *grids[:2], "--eval", EVALUATE, "--quiet")
    assert code == 2 and "other settings (varied: " in err and "--restart" in err


def test_methods_without_parts(run):
    models = ["--base", "in/base", "--model", "in/expert0", "--model", "in/expert1", "--method", "ties"]
    grids = ["--grid", "density.expert0=0.2,0.4", "--grid", "normalize=true,false"]
    code, out, _ = run(*models, *grids, "--eval", EVALUATE, "--dry-run", "out")
    assert code == 0 and "free in" not in out and "4 merged from the models, each: " in out
    code, out, _ = run(*models, *grids, "--eval", EVALUATE, "out", "--score", "score:min", "--jobs", "2")
    assert code == 0 and "best: density.expert0=" in out


def test_commands_that_change_their_folder(run):
    evaluate = "cd / && cksum < {model}/model.safetensors | cut -d ' ' -f 1"
    code, out, err = run("r.yaml", "out", "--grid", "alpha=1,2", "--eval", evaluate, "--quiet")
    assert (code, out, err) == (0, "", "")


def test_failures_are_shown(run, tmp_path):
    (tmp_path / "eval.sh").write_text('grep -q "alpha: 2" $1/merge_recipe.yaml && exit 3; echo 1\n')
    code, out, err = run("r.yaml", "out", "--grid", "alpha=1,2", "--eval", "sh eval.sh {model}")
    assert code == 0 and "failed: alpha=2: exit status 3" in out and "2/2 alpha=2: failed: exit status 3 (" in err
    code, out, err = run("r.yaml", "none", "--grid", "alpha=1,2", "--eval", "false {model}", "--quiet")
    assert (code, out) == (1, "") and "rtsvm sweep: error: none: no candidate has a score: all of 2 failed" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["r.yaml", "out", "--eval", "echo 1 {model}"], "nothing to vary"),
        (["r.yaml", "out", "--grid", "alpha"], "the following arguments are required: --eval"),
        (["r.yaml", "out", "--grid", "alpha", "--eval", "x {model}"], "--grid takes PARAMETER=VALUES, got 'alpha'"),
        (["r.yaml", "out", "--grid", "alpha=1", "--grid", "alpha=2", "--eval", "x"], "--grid alpha: given twice"),
        (["r.yaml", "out", "--grid", "weight.expert=1", "--eval", "x"], "several models begin so: expert0, expert1"),
        (["r.yaml", "out", "--grid", "alpha=1", "--eval", "nosuch {model}"], "no such program: nosuch"),
        (["r.yaml", "--grid", "alpha=1", "--eval", "x"], "name a folder after the recipe"),
        (["r.yaml", "a", "b", "--grid", "alpha=1", "--eval", "x"], "expected [RECIPE.yaml] OUT, got 3 paths"),
        (["r.yaml", "out", "--grid", "alpha=1", "--eval", "x", "--search", "grid"], "invalid choice: 'grid'"),
    ],
)
def test_mistakes(run, arguments, message):
    code, _, err = run(*arguments)
    assert code == 2 and message in err
