"""The CUDA kernels as a module for CPU tensors: a C++ compiler builds csrc/cuda against tests/cuda_on_cpu."""

import importlib.util
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch

from r_tsvm_kernels import backends, dispatch

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "csrc" / "cuda"
STAND_IN = ROOT / "tests" / "cuda_on_cpu"
CXX = shutil.which("g++") or shutil.which("c++")
ORDERS = ("forward", "reverse")  # of the blocks and threads of a launch

# A GPU refuses misaligned reads. No fortified longjmp: the fibers jump between stacks.
FIBERS = ["-fsanitize=alignment", "-fsanitize-undefined-trap-on-error", "-U_FORTIFY_SOURCE"]
THREADS = ["-fsanitize=thread", "-g1", "-DCUDA_ON_CPU_THREADS"]


def build(folder: Path, threads: bool = False) -> Path:
    """Compile the CUDA sources and their bindings as C++ in `folder`; return the module.

    The threads of a block are fibers, or with `threads` real ones under the thread sanitizer.
    """
    import pybind11

    flags = ["-std=c++17", "-O1", "-fPIC", "-ffp-contract=off", "-fno-strict-aliasing", "-include", "cuda_runtime.h"]
    flags += THREADS if threads else FIBERS
    kernels = SOURCES
    if threads:  # static variables are shared; `extern static` would be none
        kernels = shutil.copytree(SOURCES, folder / "cuda")
        header = kernels / "launch.cuh"
        header.write_text(header.read_text().replace("extern __shared__", "extern"))
    includes = [STAND_IN, ROOT / "csrc" / "include", pybind11.get_include(), sysconfig.get_path("include")]
    flags += [f"-I{path}" for path in includes]
    emulator = STAND_IN / ("threads.cpp" if threads else "fibers.cpp")
    sources = [*kernels.glob("*.cu"), ROOT / "csrc/bindings/cuda_module.cpp", emulator]
    objects = [folder / f"{source.stem}.o" for source in sources]

    def run(*command):
        done = subprocess.run([CXX, *map(str, command)], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-5000:]

    def compile_one(source, target):
        unseen = ["-fno-sanitize=thread"] if source == emulator else []
        run(*flags, *unseen, "-x", "c++", "-c", source, "-o", target)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compile_one, sources, objects))
    run("-shared", *(THREADS if threads else []), "-o", folder / "_cuda.so", *objects)
    return folder / "_cuda.so"


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("_cuda", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def install(module: ModuleType, monkeypatch) -> None:
    """Let ``backend="cuda"`` run the kernels of `module` on CPU tensors."""
    native, state = backends.native, backends.state
    monkeypatch.setattr(backends, "native", lambda name: module if name == "cuda" else native(name))
    monkeypatch.setattr(backends, "state", lambda name: backends.READY if name == "cuda" else state(name))
    for op in dispatch.ops().values():
        if "cuda" in op.order["cuda"]:
            monkeypatch.setitem(op.order, "cpu", (*op.order["cpu"], "cuda"))
    stream = SimpleNamespace(device_index=0, cuda_stream=0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
