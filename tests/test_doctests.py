"""The examples in docstrings do what they show. They see the names of their module, and torch."""

import doctest
import importlib
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "r_tsvm_kernels"
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def holds_examples(path):
    lines = path.read_text().splitlines()
    return any(line.lstrip().startswith(">>> ") for line in lines)


MODULES = sorted(module_name(path) for path in PACKAGE.rglob("*.py") if holds_examples(path))


def run_examples(module):
    """Run the examples of every docstring of a module; return how many there are, and a report of those that fail."""
    report, tried = [], 0
    for test in doctest.DocTestFinder().find(module, extraglobs={"torch": torch}):
        runner = doctest.DocTestRunner(optionflags=OPTIONS)
        tried += runner.run(test, out=report.append).attempted
    return tried, "".join(report)


@pytest.fixture
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", MODULES)
def test_examples_of(name, in_an_empty_folder):
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name.partition(".")[0] == PACKAGE.name:
            raise
        pytest.skip(f"{error.name} is not installed")
    tried, report = run_examples(module)
    assert not report, report
    assert tried, f"{name} shows '>>>' outside of a docstring"


def test_the_test_sees_a_wrong_example():
    def add(a, b):
        """Return the sum.

        >>> add(1, 1)
        3
        """
        return a + b

    (test,) = doctest.DocTestFinder().find(add, "add", globs={"add": add})
    report = []
    doctest.DocTestRunner(optionflags=OPTIONS).run(test, out=report.append)
    assert "Expected:\n    3\nGot:\n    2" in "".join(report)
