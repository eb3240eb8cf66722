"""Runs CMake for the two native modules; everything else is in pyproject.toml.

RTSVM_BUILD_CPU and RTSVM_BUILD_CUDA are each ``auto`` (default: built if possible), ``on`` (built, or the installation
fails) or ``off``. ``_build_info.json`` says what became of them. Without native modules the package runs on torch.
"""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
SWITCHES = {module: os.environ.get(f"RTSVM_BUILD_{module.upper()}", "auto") for module in ("cpu", "cuda")}
for module, wish in SWITCHES.items():
    if wish not in ("auto", "on", "off"):
        raise SystemExit(f"RTSVM_BUILD_{module.upper()} must be auto, on or off, got {wish!r}")
OFF = {module: f"off by RTSVM_BUILD_{module.upper()}" for module, wish in SWITCHES.items() if wish == "off"}


def program(name: str, folder: str) -> str:
    """Return the program of the PyPI package `name`, else its bare name for a search on PATH."""
    try:
        return str(Path(getattr(importlib.import_module(name), folder)) / name)
    except (ImportError, AttributeError):
        return name


def commit() -> str:
    """Return the git revision of this tree, or nothing if it is not a checkout of its own."""
    query = ["git", "-C", str(ROOT), "rev-parse", "--show-toplevel", "HEAD"]
    try:
        top, revision = subprocess.run(query, check=True, capture_output=True, text=True).stdout.splitlines()
    except (OSError, ValueError, subprocess.CalledProcessError):
        return ""
    return revision if Path(top) == ROOT else ""


def record(package: Path, info: dict[str, str]) -> None:
    """Write ``_build_info.json`` beside the modules; remove what an earlier build left and this one did not renew."""
    for stale in [path for module in SWITCHES if info[module] != "built" for path in package.glob(f"_{module}.*.so")]:
        stale.unlink()
    keys = dict.fromkeys(("cpu", "cuda", "cxx", "nvcc", "cuda_architectures"), "")
    package.mkdir(parents=True, exist_ok=True)
    (package / "_build_info.json").write_text(json.dumps({**keys, **info, "commit": commit()}, indent=2) + "\n")


class CMakeBuild(build_ext):
    """Configure once; build one module after the other, so that a failing one does not take the other along."""

    def run(self) -> None:
        """Build what the switches ask for."""
        cmake = program("cmake", "CMAKE_BIN_DIR")
        package = Path(self.get_ext_fullpath("r_tsvm_kernels._cpu")).resolve().parent
        build = Path(self.build_temp).resolve()
        command = self.configuration(cmake, package, build)
        # CMake sticks to the tools of its first run, but build isolation deletes them and the user may change them:
        # only a complete build with the same settings is continued.
        variables = ("PATH", "CC", "CXX", "CXXFLAGS", "LDFLAGS", "CUDACXX", "CUDAFLAGS", "CUDAARCHS", "CUDAHOSTCXX")
        settings = json.dumps([command, [os.environ.get(variable) for variable in variables]])
        stamp = build / "settings.json"
        if not (stamp.is_file() and stamp.read_text() == settings):
            command.append("--fresh")
        stamp.unlink(missing_ok=True)
        failure = self.step(command, "CMake failed", required="on" in SWITCHES.values())
        info = dict.fromkeys(SWITCHES, failure) if failure else json.loads((build / "configuration.json").read_text())
        for module, wish in SWITCHES.items():
            if module not in OFF and info[module] == "found":
                command = [cmake, "--build", str(build), "--target", f"_{module}"]
                info[module] = self.step(command, "compilation failed", required=wish == "on") or "built"
        record(package, {**info, **OFF})
        if not failure and all(module in OFF or info[module] == "built" for module in SWITCHES):
            stamp.write_text(settings)

    def configuration(self, cmake: str, package: Path, build: Path) -> list[str]:
        """Return the command that configures the build."""
        import pybind11

        return [
            cmake, "-G", "Ninja", "-S", str(ROOT), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_MAKE_PROGRAM={program('ninja', 'BIN_DIR')}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={package}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            *(f"-DRTSVM_{module.upper()}={wish}" for module, wish in SWITCHES.items()),
        ]  # fmt: skip

    def step(self, command: list[str], failure: str, required: bool) -> str:
        """Run `command`; return nothing if it worked, else the reason, unless it is required."""
        try:
            subprocess.run(command, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            if required:
                raise
            self.warn(f"native module skipped, the package runs on torch without it: {error}")
            return f"{command[0]} not found" if isinstance(error, FileNotFoundError) else failure
        return ""

    def get_source_files(self) -> list[str]:
        """Return nothing: MANIFEST.in lists the sources."""
        return []


class PureBuild(build_py):
    """Also says in a build without native modules why there are none."""

    def run(self) -> None:
        """Copy the Python files; write ``_build_info.json``."""
        super().run()
        record((ROOT if self.editable_mode else Path(self.build_lib)) / "r_tsvm_kernels", OFF)


if len(OFF) == len(SWITCHES):
    setup(cmdclass={"build_py": PureBuild})
else:
    setup(ext_modules=[Extension("r_tsvm_kernels._native", [])], cmdclass={"build_ext": CMakeBuild})
