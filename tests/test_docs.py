"""What the documentation says is so."""

import json
import re
from pathlib import Path

import pytest

import r_tsvm_kernels
from r_tsvm_kernels.methods import METHODS
from r_tsvm_kernels.sizes import parse_size

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
METHODS_PAGE = (ROOT / "docs" / "methods.md").read_text()
TEXTS = ["README.md", "CONTRIBUTING.md", "csrc/README.md", "benchmarks/peers/README.md"]
TEXTS += sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))


def test_the_map_shows_what_is_there():
    tree = README[README.rindex("```\ncsrc/") :].split("```")[1]
    listed = {line.split()[0].rstrip("/") for line in tree.splitlines() if line.startswith("  ")}
    package = {
        path.name for path in (ROOT / "r_tsvm_kernels").iterdir()
        if not path.name.startswith(("_", ".")) and path.suffix in ("", ".py")
    }  # fmt: skip
    assert listed == package
    for line in tree.splitlines():
        if line and not line.startswith(" "):
            assert (ROOT / line.split()[0]).is_dir(), line


@pytest.mark.parametrize("text", [README, METHODS_PAGE], ids=["README.md", "docs/methods.md"])
def test_every_method_is_in_the_table(text):
    rows = dict(re.findall(r"^\| `(\w+)` \|.*\]\((https://[^)]+)\) \|$", text, re.MULTILINE))
    assert rows == {name: method.paper_url for name, method in METHODS.items()}


def test_every_option_of_rtsvm_is_in_the_table():
    defaults = METHODS["rtsvm"].parameters()
    for name in type(defaults).model_fields:
        if name == "exclude_keys":
            assert "`exclude_keys`" in METHODS_PAGE
            continue
        match = re.search(rf"`{name}` \(`?([\w.]+)`?\)", METHODS_PAGE)
        assert match, name
        value = getattr(defaults, name)
        expected = value[0] if isinstance(value, tuple) else value
        assert match[1] == str(expected) or (name == "workspace" and parse_size(match[1]) == expected), name


def test_the_python_example_runs(capsys):
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    namespace = {}
    exec(compile(code, "README.md", "exec"), namespace)  # our own text
    assert namespace["merged"]["w"].shape == (512, 512)
    assert "True" in capsys.readouterr().out


@pytest.mark.parametrize("file", ["README.md", "docs/merging.md"])
def test_the_recipe_is_valid(file):
    import yaml

    text = re.search(r"```yaml\n(.*?)```", (ROOT / file).read_text(), re.DOTALL)[1]
    config = r_tsvm_kernels.MergeConfig.from_dict(yaml.safe_load(text))
    options = config.options(2, "layers.3.mlp.up", 1.0)
    assert (options.weight, options.density, options.alpha) == ((0.8, 1.0), (0.5, 0.5), 1.0)


def test_the_comparison_with_fusion_bench_is_quoted_correctly():
    results = json.loads((ROOT / "benchmarks" / "results" / "cpu" / "tsvm_vs_fusion_bench.json").read_text())
    judged = [row for row in results["rows"] if row["right"] is not None]
    ours, theirs = (max(row[key] for row in judged) for key in ("error_ours", "error_peer"))
    assert results["right"] and all(row["right"] for row in judged)
    text = " ".join(README.split())
    assert f"over {len(judged)} cases" in text
    assert f"is {ours:.1e} for ours and {theirs:.1e} for theirs".replace("e-0", "e-") in text
    (untouched,) = [row for row in results["rows"] if row["untouched_rows"]]
    assert f"{untouched['untouched_rows']} of {untouched['shape'][0]} untouched rows" in text
    assert f"{100 * untouched['untouched_energy_peer']:.1f} % of the update's energy" in text
    assert untouched["untouched_energy_ours"] == 0


@pytest.mark.parametrize("file", TEXTS)
def test_links_lead_somewhere(file):
    path = ROOT / file
    for target, anchor in re.findall(r"\]\((?!https?://)([^)#]*)#?([^)]*)\)", path.read_text()):
        aim = path.parent / target if target else path
        assert aim.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.+)$", aim.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}, anchor


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_every_page_is_in_the_navigation_and_the_readme(page):
    assert page.name in (ROOT / "mkdocs.yml").read_text()
    assert page.name == "index.md" or f"(docs/{page.name})" in README


def test_the_version_is_the_same_everywhere():
    declared = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert declared == r_tsvm_kernels.__version__
    assert f"## {declared}" in (ROOT / "CHANGELOG.md").read_text()


def test_no_file_is_too_long():
    for folder in ("r_tsvm_kernels", "csrc", "tests", "benchmarks", "examples"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in {".py", ".pyi", ".h", ".cpp", ".cu", ".cuh"}:
                assert len(path.read_text().splitlines()) <= 500, path
