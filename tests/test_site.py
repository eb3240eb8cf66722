"""The documentation site builds, is complete, and what it shows runs."""

import inspect
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from browser import BINARY, Browser

import r_tsvm_kernels
from r_tsvm_kernels import errors, linalg, lora, ops

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"


def blocks(page, language):
    return re.findall(rf"^```{language}[^\n]*\n(.*?)^```", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE)


def build(*arguments):
    """Build the site as `make docs` does; a warning fails it, unless --quiet hides it, which nothing here may add."""
    pytest.importorskip("mkdocstrings", reason="the documentation's tools are not installed (pip install .[docs])")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", *map(str, arguments)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    done = build("--site-dir", folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_it_builds_without_a_warning(site):
    page = (site / "api" / "linalg" / "index.html").read_text()
    assert "tsv_merge" in page and "Parameters:" in page
    pages = "".join(path.read_text() for path in site.rglob("*.html"))
    assert not re.findall(r'(?:src|href)="https?://[^"]*\.(?:js|css|woff2?)"', pages), "needs the network"
    assert not re.findall(r"^:::|--8<--", pages, re.MULTILINE)  # what nobody replaced
    assert 'class="example"' not in pages, "a docstring has a section `Example:`; only `Examples:` is set as code"


@pytest.mark.parametrize("mistake", ["[nowhere](nowhere.md)", "[no heading](#nothing)", "::: r_tsvm_kernels.nothing"])
def test_a_mistake_fails_the_build(tmp_path, mistake):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text(f"# Title\n\n{mistake}\n")
    (tmp_path / "mkdocs.yml").write_text(
        f"INHERIT: {ROOT / 'mkdocs.yml'}\ndocs_dir: docs\nnav: [index.md]\nextra_css: []\nextra_javascript: []\n"
    )
    done = build("--config-file", tmp_path / "mkdocs.yml", "--site-dir", tmp_path / "site")
    assert done.returncode != 0, done.stderr


@pytest.mark.slow
@pytest.mark.skipif(BINARY is None, reason="needs Chromium: apt-get install chromium")
def test_formulas_are_set_and_wide_tables_scroll(site, tmp_path):
    browser = Browser(tmp_path)
    try:
        pages = [path for path in site.rglob("*.html") if 'class="arithmatex"' in path.read_text()]
        assert pages
        for page in pages:
            browser.open(page, width=390, height=844)
            counts = "['.arithmatex', '.arithmatex .katex', '.katex-error'].map((s) => $$(s).length)"
            marked, drawn, wrong = browser.run(f"const $$ = (s) => document.querySelectorAll(s); {counts}")
            assert marked == drawn > 0 and not wrong, page
            assert browser.run("document.documentElement.scrollWidth") == 390, page
    finally:
        browser.close()


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


def run_commands(lines):
    """Run commands of a page in the current folder, with the examples there."""
    Path("examples").symlink_to(ROOT / "examples")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    for line in lines:
        program, *arguments = shlex.split(line)
        start = {"python": [sys.executable], "rtsvm": [sys.executable, "-m", "r_tsvm_kernels"]}.get(program, [program])
        done = subprocess.run([*start, *arguments], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_tutorial_runs(tmp_path, monkeypatch):
    pytest.importorskip("sklearn", reason="the tutorial's demo needs scikit-learn (pip install .[demo])")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(*blocks("tutorial.md", "yaml"))
    commands = [line for block in blocks("tutorial.md", "bash") for line in block.splitlines()]
    assert len(commands) >= 8
    run_commands(commands)
    for code in blocks("tutorial.md", "python"):
        exec(compile(code, "tutorial.md", "exec"), {})  # our own text


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_example_of_a_sweep_runs(tmp_path, monkeypatch):
    pytest.importorskip("sklearn", reason="the example needs scikit-learn (pip install .[demo])")
    monkeypatch.chdir(tmp_path)
    (block,) = [block for block in blocks("sweep.md", "bash") if "sweep_demo.py --quick" in block]
    assert len(block.splitlines()) == 4
    run_commands(block.splitlines())


@pytest.mark.parametrize(("page", "count"), [("tools.md", 4), ("lora.md", 1), ("sweep.md", 1)])
def test_the_examples_in_python_run(page, count, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    codes = blocks(page, "python")
    assert len(codes) >= count
    for code in codes:
        exec(compile(code, page, "exec"), {})  # our own text


def test_shortcuts_are_measured_as_the_page_says():
    import torch
    from compare import relative_error
    from spectra import spectrum

    from benchmarks.shortcuts import rounded, shortcuts
    from r_tsvm_kernels.bench import published

    assert torch.equal(rounded(torch.tensor([1 + 2**-9, 3.0]), 8), torch.tensor([1.0, 3.0]))
    matrices = torch.stack([spectrum("flat", 60, 48, seed) for seed in range(3)])
    exact = published.tsv_merge(list(matrices.double()), [16] * 3)
    errors_of = {name: relative_error(found, exact) for name, found in shortcuts(matrices, 16).items()}
    assert errors_of["randomised SVD, 2 power iterations"] > 0.01 > 1e-3 > errors_of["ours, exact, solver eigen"]
