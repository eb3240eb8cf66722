"""The results and messages of an installation, for each combination of compilers and switches, in copies of the
tree."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ["setup.py", "CMakeLists.txt", "MANIFEST.in", "pyproject.toml", "csrc", "r_tsvm_kernels"]
TEXTS = ["README.md", "LICENSE"]  # named by pyproject.toml
NOWHERE = "/nonexistent/compiler"
NO_CXX = {"CXX": NOWHERE}
NO_NVCC = {"CUDACXX": NOWHERE}
CPU_ONLY = {"RTSVM_BUILD_CUDA": "off"}

missing = [name for name in ("pip", "setuptools", "pybind11", "cmake", "ninja") if not importlib.util.find_spec(name)]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.exhaustive,
    pytest.mark.skipif(bool(missing), reason=f"the build needs {', '.join(missing)}: pip install r-tsvm-kernels[test]"),
]
needs_cxx = pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="no C++ compiler on PATH")
needs_nvcc = pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc on PATH")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the sources without anything built."""
    target = tmp_path / "tree"
    target.mkdir()
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "_build_info.json")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target / name, ignore=ignore)
        else:
            shutil.copy(ROOT / name, target)
    for name in TEXTS:
        (target / name).write_text("text")
    return target


def run(command: list[str], folder: Path, variables: dict[str, str]) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RTSVM_")}
    # One architecture: what is compiled for the others is tests/test_cross_compile.py's matter.
    environment.update({"CUDAARCHS": "90-real", "PIP_DISABLE_PIP_VERSION_CHECK": "1", **variables})
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=400)


def build_wheel(tree: Path, **variables: str) -> tuple[subprocess.CompletedProcess, Path | None]:
    out = tree.parent / "wheels"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-v", "-w", str(out), "."]
    done = run(command, tree, variables)
    wheels = list(out.glob("*.whl"))
    return done, wheels[0] if wheels else None


def contents(tree: Path, **variables: str) -> tuple[Path, set[str], dict[str, str]]:
    """Build a wheel that must succeed; return it, the names of its modules, and its build information.

    It is unpacked beside the tree.
    """
    done, wheel = build_wheel(tree, **variables)
    assert done.returncode == 0 and wheel is not None, done.stdout[-3000:] + done.stderr[-3000:]
    unpacked = tree.parent / "unpacked"
    shutil.rmtree(unpacked, ignore_errors=True)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(unpacked)
    package = unpacked / "r_tsvm_kernels"
    assert (package / "py.typed").is_file()
    assert {path.name for path in (package / "report").iterdir()} >= {"template.html", "page.css", "page.js"}
    assert (package / "sweep" / "page.css").is_file()
    info = json.loads((package / "_build_info.json").read_text())
    assert set(info) == {"cpu", "cuda", "cxx", "nvcc", "cuda_architectures", "commit"}
    return wheel, {path.name.split(".")[0] for path in package.glob("*.so")}, info


def failure(tree: Path, **variables: str) -> str:
    done, wheel = build_wheel(tree, **variables)
    assert done.returncode != 0
    assert wheel is None
    return done.stdout + done.stderr


def assert_free_of_torch(module: Path) -> None:
    """Neither a symbol nor a needed library of the module is torch's, and it loads without torch."""
    for tool in (["nm", "-DC"], ["readelf", "-d"]):
        if shutil.which(tool[0]):
            listing = subprocess.run([*tool, str(module)], check=True, capture_output=True, text=True).stdout
            assert not [line for line in listing.splitlines() if re.search(r"torch|libc10|\b(c10|at)::", line)]
    name = module.name.split(".")[0]
    program = f"import sys, {name}; assert 'torch' not in sys.modules; {name}.magnitude_select"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=module.parent, timeout=60)


@needs_cxx
@needs_nvcc
def test_the_sdist_builds_both_modules_or_the_one_that_compiles(tree):
    pytest.importorskip("build", reason="makes the sdist: pip install r-tsvm-kernels[test]")
    done = run([sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", "dist"], tree, {})
    assert done.returncode == 0, done.stderr
    with tarfile.open(next((tree / "dist").glob("*.tar.gz"))) as archive:
        archive.extractall(tree.parent / "sdist", filter="data")
    sdist = next((tree.parent / "sdist").iterdir())
    wheel, modules, info = contents(sdist)
    assert modules == {"_cpu", "_cuda"}
    assert (info["cpu"], info["cuda"], info["cuda_architectures"]) == ("built", "built", "90-real")
    assert info["cxx"] and info["nvcc"] and not info["commit"]
    assert "none-any" not in wheel.name
    package = sdist.parent / "unpacked" / "r_tsvm_kernels"
    for module in package.glob("*.so"):
        assert_free_of_torch(module)
    if not torch.cuda.is_available():
        program = "import _cuda; _cuda.magnitude_select((0, 1, 1, 1, 1), None, [1], (0, 0, 0), 0, 0, 0)"
        done = subprocess.run([sys.executable, "-c", program], cwd=package, capture_output=True, text=True, timeout=60)
        assert "RuntimeError: magnitude_select: " in done.stderr
        assert "CUDA" in done.stderr  # its own words

    # A CUDA file that does not compile does not take the CPU module along.
    header = sdist / "csrc" / "cuda" / "check.cuh"
    header.write_text("#error broken by the test\n" + header.read_text())
    _, modules, info = contents(sdist)
    assert modules == {"_cpu"}
    assert (info["cpu"], info["cuda"]) == ("built", "compilation failed")


@needs_cxx
def test_cuda_off_and_builds_that_follow(tree):
    _, modules, info = contents(tree, **CPU_ONLY)
    assert modules == {"_cpu"}
    assert (info["cpu"], info["cuda"], info["nvcc"]) == ("built", "off by RTSVM_BUILD_CUDA", "")

    compiled = next((tree / "build").rglob("task_statistics.cpp.o"))
    before = compiled.stat().st_mtime_ns
    assert contents(tree, **CPU_ONLY)[1] == {"_cpu"}
    assert compiled.stat().st_mtime_ns == before, "compiled again although nothing has changed"

    _, modules, info = contents(tree, **CPU_ONLY, **NO_CXX)
    assert modules == set(), "a module of the earlier build is left in the wheel"
    assert info["cpu"] == "no C++ compiler found"


@needs_cxx
def test_cuda_on_without_nvcc_fails(tree):
    assert "specified in the environment variable CUDACXX" in failure(tree, RTSVM_BUILD_CUDA="on", **NO_NVCC)


def test_no_compiler_gives_a_pure_installation(tree):
    _, modules, info = contents(tree, **NO_CXX, **NO_NVCC)
    assert modules == set()
    assert info["cpu"] == info["cuda"] == "no C++ compiler found"


def test_no_cmake_gives_a_pure_installation(tree, tmp_path):
    stub = tmp_path / "stub"
    stub.mkdir()
    (stub / "cmake.py").write_text("raise ImportError('hidden by the test')\n")
    _, modules, info = contents(tree, PYTHONPATH=str(stub), PATH=str(stub))
    assert modules == set()
    assert info["cpu"] == info["cuda"] == "cmake not found"


def test_cpu_on_without_compiler_fails(tree):
    assert "specified in the environment variable CXX" in failure(tree, RTSVM_BUILD_CPU="on", **CPU_ONLY, **NO_CXX)


def test_both_off_gives_a_wheel_for_every_platform(tree):
    wheel, modules, info = contents(tree, RTSVM_BUILD_CPU="off", **CPU_ONLY)
    assert wheel.name.endswith("-py3-none-any.whl")
    assert modules == set()
    assert (info["cpu"], info["cuda"]) == ("off by RTSVM_BUILD_CPU", "off by RTSVM_BUILD_CUDA")


def test_unknown_switch_is_an_error(tree):
    assert "RTSVM_BUILD_CUDA must be auto, on or off, got 'yes'" in failure(tree, RTSVM_BUILD_CUDA="yes")
