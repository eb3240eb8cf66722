"""Which implementation of an op runs. The only file that decides.

A backend asked for by name runs or raises; only the automatic choice moves on to the next one. The choice depends on
the device of the tensors, this table and what is installed, on nothing else. Triton's interpreter, for tests, takes
tensors on the CPU; it must be asked for by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import backends
from .errors import BackendUnavailableError, DeviceError

if TYPE_CHECKING:
    from torch import Tensor

# op -> device type -> implementations in order of preference, fastest first. "torch" is the reference and always there.
# On CUDA it comes first until the kernels have run on a GPU: a kernel that was only compiled must be asked for by name.
ORDER: dict[str, dict[str, tuple[str, ...]]] = {
    "task_statistics": {"cuda": ("torch", "cuda", "triton"), "cpu": ("cpu", "torch")},
    "magnitude_select": {"cuda": ("torch", "cuda", "triton"), "cpu": ("cpu", "torch")},
    "magnitude_histogram": {"cuda": ("torch", "cuda", "triton"), "cpu": ("cpu", "torch")},
    "magnitude_ranks": {"cuda": ("torch", "cuda", "triton"), "cpu": ("cpu", "torch")},
    "ranked_mask": {"cuda": ("torch", "triton"), "cpu": ("cpu", "torch")},
    "reweight_prune": {"cuda": ("torch", "cuda", "triton"), "cpu": ("cpu", "torch")},
    "reweight_prune_inplace": {"cuda": ("torch", "cuda", "triton"), "cpu": ("cpu", "torch")},
    "reweight_prune_planes": {"cuda": ("torch", "cuda", "triton"), "cpu": ("torch",)},
    "add_update": {"cuda": ("torch", "cuda", "triton"), "cpu": ("torch",)},
    "random_mask": {"cuda": ("torch", "cuda", "triton"), "cpu": ("cpu", "torch")},
    "elect_and_sum": {"cuda": ("torch", "cuda", "triton"), "cpu": ("cpu", "torch")},
    "task_gram": {"cuda": ("torch", "triton"), "cpu": ("cpu", "torch")},
    "task_spread": {"cuda": ("torch", "triton"), "cpu": ("cpu", "torch")},
    "split_planes": {"cuda": ("torch", "triton"), "cpu": ("torch",)},
    "symm_gram": {"cuda": ("torch", "triton"), "cpu": ("torch",)},
    "symm_square": {"cuda": ("torch", "triton"), "cpu": ("torch",)},
    "gemm3": {"cuda": ("torch", "triton"), "cpu": ("torch",)},
}

MODULE = {"torch": "reference", "cpu": "cpu_kernel", "cuda": "cuda_kernel", "triton": "triton_kernel"}

_forced: ContextVar[dict[str, str]] = ContextVar("forced_backends")


@contextmanager
def use_backend(backend: str | None = None, /, **per_op: str) -> Iterator[None]:
    """Force backends inside a ``with`` block.

    Args:
        backend: for every op that has it, on whatever device; the other ops choose as ever. None forces nothing.
        per_op: for single ops, which goes before `backend`: the keyword is the op, the value its backend.

    Raises:
        BackendUnavailableError: an op or a backend of that name does not exist.

    Example:
        >>> with use_backend("cpu", elect_and_sum="torch"):
        ...     chosen("elect_and_sum", "cpu")
        'torch'
    """
    if backend is not None and backend not in MODULE:
        raise BackendUnavailableError(f"no backend {backend!r}; there are {', '.join(MODULE)}")
    known = {op: sorted({name for order in devices.values() for name in order}) for op, devices in ORDER.items()}
    for op, name in per_op.items():
        if name not in known.get(op, ()):
            raise BackendUnavailableError(
                f"{op}: no backend {name!r}; ops: {sorted(ORDER)}; backends of {op}: {known.get(op, [])}"
            )
    choice = {op: backend for op, names in known.items() if backend in names} | per_op
    token = _forced.set({**_forced.get({}), **choice})
    try:
        yield
    finally:
        _forced.reset(token)


def explain(op: str, device_type: str) -> list[tuple[str, str]]:
    """List the candidates of `op` on a device type, each with ``"ready"`` or the reason why it cannot run."""
    return [(name, backends.state(name)) for name in ORDER[op].get(device_type, ())]


def chosen(op: str, device_type: str) -> str | None:
    """Return the backend that `op` takes on a device type now: the one that is forced, or the first that is ready.

    The only answer to "which backend will run?": memory is planned and merges are compared by it.
    """
    ready = (name for name, state in explain(op, device_type) if state == backends.READY)
    return _forced.get({}).get(op) or next(ready, None)


def by_reference(device_type: str, *ops: str) -> bool:
    """Whether the reference in torch, which stores what kernels do not, runs one of these ops on a device type now."""
    return any(chosen(op, device_type) == "torch" for op in ops)


def select(op: str, *tensors: Tensor, backend: str | None = None) -> Callable[..., Any]:
    """Return the ``run`` function that carries out `op` on these tensors; its results carry no graph.

    Raises:
        DeviceError: the tensors lie on different devices, or on one that no implementation knows.
        BackendUnavailableError: `backend` (or the one forced by `use_backend`) cannot run here.
    """
    from torch import no_grad

    devices = {str(tensor.device) for tensor in tensors}
    device_type = tensors[0].device.type
    if len(devices) != 1 or device_type not in ORDER[op]:
        raise DeviceError(
            f"{op}: all tensors must lie on one device of type {' or '.join(sorted(ORDER[op]))}, "
            f"got {', '.join(sorted(devices))}; move them with .to()"
        )
    wanted = backend or _forced.get({}).get(op)
    candidates = explain(op, device_type)
    if wanted == "triton" and device_type == "cpu" and "triton" in ORDER[op].get("cuda", ()):
        candidates.append(("triton", backends.triton_interpreter_state()))
    for name, state in candidates:
        if state == backends.READY and wanted in (None, name):
            run: Callable[..., Any] = import_module(f"r_tsvm_kernels.ops.{op}.{MODULE[name]}").run
            return no_grad()(run)
    tried = "; ".join(f"{name}: {state}" for name, state in candidates)
    raise BackendUnavailableError(
        f"{op}: backend {wanted!r} cannot run on {device_type} here ({tried}); see `rtsvm info`"
    )
