"""Which backends this machine can run, and why others cannot: probed on first use, never at import."""

from __future__ import annotations

import importlib
import json
import os
from functools import lru_cache
from pathlib import Path
from types import ModuleType

READY = "ready"
_BUILD_INFO = Path(__file__).with_name("_build_info.json")


def build_info() -> dict[str, str]:
    """Return the outcome of the build of each native module, and the compilers; empty if unknown."""
    try:
        info: dict[str, str] = json.loads(_BUILD_INFO.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return info


@lru_cache
def state(backend: str) -> str:
    """Return ``"ready"``, or why `backend` cannot run on this machine.

    Args:
        backend: ``torch``, ``cpu``, ``cuda``, ``triton`` or ``cublas``.
    """
    if backend == "torch":
        return READY
    if backend == "cpu":
        return _extension_state("cpu")
    if backend == "cuda":
        import torch

        extension = _extension_state("cuda")
        if extension != READY:
            return extension
        return READY if torch.cuda.is_available() else "torch sees no CUDA device"
    if backend == "triton":
        import torch

        installed = triton_state()
        if installed != READY or triton_interpreter_state() == READY:
            return installed
        return READY if torch.cuda.is_available() else "torch sees no CUDA device"
    if backend == "cublas":
        import torch

        if "dtype" not in torch.ops.aten.baddbmm.overloads():  # type: ignore[no-untyped-call]
            return f"torch {torch.__version__} is too old: fp16 products need 2.8 or newer"
        return READY if torch.cuda.is_available() else "torch sees no CUDA device"
    raise ValueError(f"unknown backend {backend!r}")


def triton_interpreter_state() -> str:
    """Return ``"ready"``, or why Triton kernels cannot run on CPU tensors, which needs Triton's interpreter."""
    installed = triton_state()
    if installed == READY and os.environ.get("TRITON_INTERPRET") != "1":
        return "on the CPU it runs only in Triton's interpreter: set TRITON_INTERPRET=1"
    return installed


@lru_cache
def native(backend: str) -> ModuleType:
    """Return the compiled module of `backend` (``cpu`` or ``cuda``)."""
    import torch  # noqa: F401  # first, so that one OpenMP runtime serves both

    return importlib.import_module(f"._{backend}", __package__)


def _extension_state(backend: str) -> str:
    try:
        native(backend)
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == f"{__package__}._{backend}":
            return build_info().get(backend, "the native module was not built")
        return f"the native module does not load: {error}"
    return READY


@lru_cache
def triton_state() -> str:
    """Return ``"ready"``, or why triton cannot be used to compile, which needs no GPU."""
    try:
        import triton
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "triton":
            return "triton is not installed; CUDA builds of torch bring it along"
        return f"triton does not load: {error}"
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 4):
        return f"triton {triton.__version__} is too old: histograms with a mask need 3.4 or newer"
    return READY
