"""The documentation site builds, is complete, and what it shows runs."""

import inspect
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import r_tsvm_kernels
from r_tsvm_kernels import errors, linalg, lora, ops

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"


def blocks(page, language):
    return re.findall(rf"^```{language}[^\n]*\n(.*?)^```", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE)


def test_it_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocstrings", reason="the documentation's tools are not installed (pip install .[docs])")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "site" / "api" / "linalg" / "index.html").read_text()
    assert 'id="r_tsvm_kernels.linalg.merging.tsv_merge"' in page
    pages = "".join(path.read_text() for path in (tmp_path / "site").rglob("*.html"))
    assert not re.findall(r'(?:src|href)="https?://(?!arxiv|github)[^"]*\.(?:js|css|woff2?)"', pages), (
        "needs the network"
    )


@pytest.mark.parametrize("module", [r_tsvm_kernels, ops, linalg, lora], ids=lambda module: module.__name__)
def test_every_public_class_and_function_is_in_the_reference(module):
    lines = "".join(path.read_text() for path in DOCS.glob("api/*.md")).splitlines()
    shown = {line.rpartition(".")[2] for line in lines if line.startswith(":::")} | set(vars(errors))
    public = {
        name
        for name in module.__all__
        if inspect.isclass(getattr(module, name)) or inspect.isfunction(getattr(module, name))
    }
    assert public <= shown


@pytest.mark.slow
def test_the_tutorial_runs(tmp_path, monkeypatch):
    pytest.importorskip("sklearn", reason="the tutorial's demo needs scikit-learn (pip install .[demo])")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "recipe.yaml").write_text(*blocks("tutorial.md", "yaml"))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    commands = [line for block in blocks("tutorial.md", "bash") for line in block.splitlines()]
    assert len(commands) >= 8
    for line in commands:
        program, *arguments = shlex.split(line)
        start = {"python": [sys.executable], "rtsvm": [sys.executable, "-m", "r_tsvm_kernels"]}.get(program, [program])
        done = subprocess.run([*start, *arguments], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    for code in blocks("tutorial.md", "python"):
        exec(compile(code, "tutorial.md", "exec"), {})  # our own text


@pytest.mark.parametrize(("page", "count"), [("tools.md", 3), ("lora.md", 1)])
def test_the_examples_in_python_run(page, count):
    codes = blocks(page, "python")
    assert len(codes) >= count
    for code in codes:
        exec(compile(code, page, "exec"), {})  # our own text


def test_shortcuts_are_measured_as_the_page_says(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import torch
    from shortcuts import merge_by_svd, polar_by_svd, relative, rounded, shortcuts, svds
    from spectra import spectrum

    assert torch.equal(rounded(torch.tensor([1 + 2**-9, 3.0]), 8), torch.tensor([1.0, 3.0]))
    matrices = torch.stack([spectrum("flat", 60, 48, seed) for seed in range(3)])
    exact = merge_by_svd(svds(matrices.double()), 16, polar_by_svd)
    errors_of = {name: relative(found, exact) for name, found in shortcuts(matrices, 16).items()}
    assert errors_of["randomised SVD, 2 power iterations"] > 0.01 > 1e-3 > errors_of["ours, exact, solver eigen"]
