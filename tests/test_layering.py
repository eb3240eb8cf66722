"""Each layer imports only those before it."""

import ast
import importlib
import sys
import types
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "r_tsvm_kernels"

# Modules and folders of the package, from the bottom up.
LAYERS = [
    {"errors", "experts", "parameters", "system", "text"},
    {"blocks", "fused", "sizes", "files", "safe_yaml", "quantised"},
    {"backends", "foreign_devices", "verdicts"},
    {"dispatch"},
    {"ops"},
    {"linalg", "checkpoint"},
    {"parts_folder"},
    {"methods", "lora"},
    {"entries", "recipe_fields"},
    {"recipe_forms"},
    {"steps"},
    {"config", "tied"},
    {"values"},
    {"treatments"},
    {"missing"},
    {"merge"},
    {"parts"},
    {"state_dicts", "plan"},
    {"report", "module_tensors"},
    {"engine"},
    {"loaded_parts", "lora_tools", "sweep"},
    {"integrations"},
    {"bench"},
    {"selfcheck"},
    {"cli"},
    {"__main__"},
]
LEVEL = {name: level for level, layer in enumerate(LAYERS) for name in layer}
# The version and the lazy table of public names live in the package root, which imports nothing at run time.
ROOT_NAMES = {"__version__", "backends", "dispatch"}


def layer_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_layers(path: Path):
    """Yield the layer of every import of the package, and whether it runs only when a function is called."""
    parts = list(path.relative_to(PACKAGE).with_suffix("").parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            anchor = parts[: len(parts) - node.level]
            target = anchor + (node.module.split(".") if node.module else [])
            yield from [target[0]] if target else [alias.name for alias in node.names if alias.name != "__version__"]
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
            for name in names:
                if name.startswith("r_tsvm_kernels."):
                    yield name.split(".")[1]


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    here = layer_of(path)
    for target in imported_layers(path):
        assert target in LEVEL, f"{target} is in no layer: add it to LAYERS"
        assert LEVEL[target] <= LEVEL[here], f"{here} must not import {target}"
        if LEVEL[target] == LEVEL[here]:
            assert target == here, f"{here} and {target} are of the same layer"


def test_every_module_has_a_layer():
    assert {layer_of(path) for path in FILES} <= LEVEL.keys()


def test_the_test_sees_an_upward_import(tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.PACKAGE", tmp_path)
    (tmp_path / "ops").mkdir()
    (tmp_path / "ops" / "bad.py").write_text("from ..methods.base import Method\nfrom .. import engine\n")
    assert list(imported_layers(tmp_path / "ops" / "bad.py")) == ["methods", "engine"]


def test_native_code_never_includes_torch():
    for path in (PACKAGE.parent / "csrc").rglob("*"):
        if path.suffix in {".h", ".cpp", ".cu", ".cuh"}:
            includes = [line for line in path.read_text().splitlines() if line.startswith("#include")]
            assert not any("torch" in line or "ATen" in line or "c10" in line for line in includes), path
            if "bindings" not in path.parts:
                assert not any("pybind11" in line or "Python.h" in line for line in includes), path


def shadowed(package, folder):
    """Return the submodules of a package that one of its attributes hides: `import package.name as x` gives that."""
    names = {path.stem for path in folder.glob("*.py")} | {path.parent.name for path in folder.glob("*/__init__.py")}
    return sorted(
        name
        for name in names - {"__init__"}
        if getattr(package, name, None) not in (None, sys.modules.get(f"{package.__name__}.{name}"))
    )


PACKAGES = sorted(path.parent for path in PACKAGE.rglob("__init__.py") if (PACKAGE / "ops") not in path.parents)


@pytest.mark.parametrize("folder", PACKAGES, ids=lambda path: str(path.relative_to(PACKAGE.parent)))
def test_no_attribute_hides_a_module(folder):
    name = ".".join(folder.relative_to(PACKAGE.parent).parts)
    try:
        package = importlib.import_module(name)
    except ModuleNotFoundError as error:
        pytest.skip(f"{error.name} is not installed")
    assert not shadowed(package, folder)


def test_the_test_sees_a_hidden_module(tmp_path):
    (tmp_path / "shrink.py").touch()
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "__init__.py").touch()
    package = types.ModuleType("package")
    assert not shadowed(package, tmp_path)
    package.shrink = package.inner = lambda: None
    assert shadowed(package, tmp_path) == ["inner", "shrink"]
