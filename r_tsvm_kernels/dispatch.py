"""Which implementation of an op runs. The only file that decides.

Each op describes itself where it is defined: `ops/<op>/__init__.py` decorates the public function with `op`. A backend
asked for by name runs or raises; only the automatic choice moves on to the next one. On a GPU, it takes the fastest
backend that passed its self-check there (`verdicts`), on a CPU the first of the op's order that is ready. A process
that has made a choice keeps to it. Triton's interpreter, for tests, takes tensors on the CPU; it must be asked for by
name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ContextDecorator, contextmanager
from contextvars import ContextVar, Token
from functools import update_wrapper
from importlib import import_module
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar

from . import backends, verdicts
from .errors import BackendUnavailableError, DeviceError
from .foreign_devices import on_own_device

if TYPE_CHECKING:
    from torch import Tensor

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

MODULE = {
    "torch": "reference",
    "cpu": "cpu_kernel",
    "cuda": "cuda_kernel",
    "triton": "triton_kernel",
    "cublas": "cublas",
}

_forced: ContextVar[dict[str, str]] = ContextVar("forced_backends")
# (op, device type) -> backend
_settled: ContextVar[dict[tuple[str, str], str | None]] = ContextVar("settled_backends")


class Op(Generic[Arguments, Result]):
    """An op of the package: call it, or look up what runs it.

    The modules of its folder are its attributes: ``task_spread.reference.run`` is the definition of `task_spread`.

    Attributes:
        name: of the op, its folder, its kernels, its test and its benchmark.
        topic: under which the reference lists it.
        order: device type -> backends, probably the fastest first. "torch", the reference, is always the last one.
        accuracy: None if every backend gives the bits of the reference; or the largest distance of a floating-point
            result from the reference's, relative to its largest element.
        small: attribute of the op's Triton kernel -> a value with which tensors of a few hundred elements, all that
            Triton's interpreter can handle, take several blocks.
    """

    def __init__(
        self,
        function: Callable[Arguments, Result],
        topic: str,
        order: dict[str, tuple[str, ...]],
        accuracy: float | None,
        small: Mapping[str, int],
    ) -> None:
        update_wrapper(self, function)
        self._function = on_own_device(function)
        self.name = function.__name__
        self.topic = topic
        self.order = order
        self.accuracy = accuracy
        self.small = small

    def __call__(self, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        """Run the op; see its own docstring."""
        return self._function(*args, **kwargs)

    @property
    def backends(self) -> tuple[str, ...]:
        """Every backend that has the op, on any device."""
        return tuple(name for name in MODULE if any(name in names for names in self.order.values()))

    def __repr__(self) -> str:
        return f"<op {self.name}: {', '.join(self.backends)}>"

    def __reduce__(self) -> str:
        return self.name  # pickled by its name, as functions are

    if not TYPE_CHECKING:

        def __getattr__(self, name):
            """Return a module of the op's folder, because the op hides the package of that name."""
            if name.startswith("__"):
                raise AttributeError(name)
            package = import_module(self.__module__)
            if hasattr(package, name):
                return getattr(package, name)
            try:
                return import_module(f"{self.__module__}.{name}")
            except ModuleNotFoundError as error:
                if error.name != f"{self.__module__}.{name}":
                    raise
                raise AttributeError(f"op {self.name} has no attribute {name!r}") from None


_OPS: dict[str, Op[..., Any]] = {}


def op(
    topic: str,
    *,
    cpu: tuple[str, ...] = ("torch",),
    cuda: tuple[str, ...] = ("torch",),
    accuracy: float | None = None,
    small: Mapping[str, int] | None = None,
) -> Callable[[Callable[Arguments, Result]], Op[Arguments, Result]]:
    """Make the decorated function an `Op`, registered under its name.

    Args:
        topic: see `Op`.
        cpu: backends for tensors on a CPU, fastest first.
        cuda: backends for tensors on a CUDA device. The fastest of those that pass their self-check there is taken.
        accuracy: see `Op`.
        small: see `Op`.
    """

    def decorate(function: Callable[Arguments, Result]) -> Op[Arguments, Result]:
        found = Op(function, topic, {"cpu": cpu, "cuda": cuda}, accuracy, small or {})
        _OPS[found.name] = found
        return found

    return decorate


def ops() -> Mapping[str, Op[..., Any]]:
    """Return all ops by name."""
    import_module(".ops", __package__)
    return _OPS


class use_backend(ContextDecorator):
    """Force backends inside a ``with`` block; a call alone forces nothing.

    Args:
        backend: for every op that has it, on any device; other ops choose automatically. None forces nothing.
        per_op: for single ops, with precedence over `backend`: the keyword is the op, the value its backend.

    Raises:
        BackendUnavailableError: an op or a backend of that name does not exist.

    Examples:
        >>> with use_backend("cpu", elect_and_sum="torch"):
        ...     chosen("elect_and_sum", "cpu")
        'torch'
    """

    def __init__(self, backend: str | None = None, /, **per_op: str) -> None:
        if backend is not None and backend not in MODULE:
            raise BackendUnavailableError(f"no backend {backend!r}; expected one of {', '.join(MODULE)}")
        known = {name: found.backends for name, found in ops().items()}
        for name, wanted in per_op.items():
            if name not in known:
                raise BackendUnavailableError(f"no op {name!r}; expected one of {', '.join(sorted(known))}")
            if wanted not in known[name]:
                raise BackendUnavailableError(
                    f"{name}: no backend {wanted!r}; expected one of {', '.join(known[name])}"
                )
        self._choice = {name: backend for name, names in known.items() if backend in names} | per_op
        self._tokens: list[Token[dict[str, str]]] = []

    def __enter__(self) -> None:
        """Force the backends, on top of those that are forced already."""
        self._tokens.append(_forced.set({**_forced.get({}), **self._choice}))

    def __exit__(self, *error: object) -> None:
        """Force what was forced before."""
        _forced.reset(self._tokens.pop())


def forced_backends() -> dict[str, str]:
    """Return the backend of each op that `use_backend` forces now, to force the same in another process."""
    return dict(_forced.get({}))


@contextmanager
def settled(choice: Mapping[str, str | None], device_type: str) -> Iterator[None]:
    """Keep to these backends, by op, on a device type inside a ``with`` block; `use_backend` takes precedence.

    A merge that is resumed, or spread over processes, runs the same kernels everywhere with this.
    """
    token = _settled.set({**_settled.get({}), **{(op, device_type): backend for op, backend in choice.items()}})
    try:
        yield
    finally:
        _settled.reset(token)


def prepare(names: Iterable[str], device_type: str) -> None:
    """Check kernels of these ops that have no verdict on a device type yet, all together: see `verdicts.require`."""
    if device_type in verdicts.CHECKED:
        verdicts.require({name: _kernels(name, device_type) for name in names}, device_type)


def _kernels(name: str, device_type: str) -> list[str]:
    """Return the backends of an op beside the reference that the installed software can run."""
    order = ops()[name].order.get(device_type, ())
    return [backend for backend in order if backend != "torch" and backends.state(backend) == backends.READY]


def explain(name: str, device_type: str) -> list[tuple[str, str]]:
    """List the candidates of an op on a device type, each with ``"ready"`` or the reason why it cannot run.

    Nothing is checked here: a kernel that has no verdict yet is ready.
    """
    found = verdicts.known(name, device_type)
    candidates = []
    for backend in ops()[name].order.get(device_type, ()):
        verdict, state = found.get(backend), backends.state(backend)
        if state == backends.READY and verdict is not None and not verdict.passed:
            state = verdict.reason if verdict == verdicts.UNCHECKED else f"its self-check failed: {verdict.reason}"
        candidates.append((backend, state))
    return candidates


def chosen(name: str, device_type: str, *, check: bool = True) -> str | None:
    """Return the backend that an op takes on a device type now: the forced one, or the automatic choice.

    The only answer to "which backend will run?": memory is planned and merges are compared by it.

    Args:
        name: of the op.
        device_type: ``cpu`` or ``cuda``.
        check: whether to run self-checks on which the choice depends; without, kernels that have no verdict are not
            taken.
    """
    wanted = _forced.get({}).get(name) or _settled.get({}).get((name, device_type))
    if wanted is not None:
        return wanted
    if check:
        prepare([name], device_type)
    ready = [backend for backend, state in explain(name, device_type) if state == backends.READY]
    if device_type not in verdicts.CHECKED:
        return next(iter(ready), None)
    found = verdicts.known(name, device_type)
    times = {backend: found[backend].seconds for backend in ready if backend in found}
    timed = {backend: seconds for backend, seconds in times.items() if seconds is not None}
    return min(timed, key=lambda backend: timed[backend], default="torch" if "torch" in ready else None)


def unusable(name: str, backend: str | None, device_type: str) -> str | None:
    """Return why the automatic choice could not be this backend; None if it could."""
    state = dict(explain(name, device_type)).get(backend or "", "the op has no such kernel")
    if state != backends.READY:
        return state
    if backend == "torch" or device_type not in verdicts.CHECKED or backend in verdicts.known(name, device_type):
        return None
    return "it has no verdict of a self-check" if verdicts.enabled() else "RTSVM_SELFCHECK=off leaves out kernels"


def by_reference(device_type: str, *names: str) -> bool:
    """Whether the reference in torch, which stores what kernels do not, runs one of these ops on a device type now."""
    return any(chosen(name, device_type) == "torch" for name in names)


def select(name: str, *tensors: Tensor, backend: str | None = None) -> Callable[..., Any]:
    """Return the ``run`` function that carries out an op on these tensors; its results carry no graph.

    Raises:
        DeviceError: the tensors are on different devices, or on one that no implementation supports.
        BackendUnavailableError: `backend` (or the one forced by `use_backend`) cannot run here.
    """
    from torch import no_grad

    order = ops()[name].order
    devices = {str(tensor.device) for tensor in tensors}
    device_type = tensors[0].device.type
    if len(devices) != 1 or device_type not in order:
        raise DeviceError(
            f"{name}: all tensors must be on one device of type {' or '.join(sorted(order))}, "
            f"got {', '.join(sorted(devices))}; move them with .to()"
        )
    wanted = backend or chosen(name, device_type)
    if wanted != "torch":
        prepare([name], device_type)
    candidates = explain(name, device_type)
    if wanted == "triton" and device_type == "cpu" and "triton" in order.get("cuda", ()):
        candidates.append(("triton", backends.triton_interpreter_state()))
    for candidate, state in candidates:
        if state == backends.READY and wanted == candidate:
            run: Callable[..., Any] = import_module(f".ops.{name}.{MODULE[candidate]}", __package__).run
            return no_grad()(run)
    tried = "; ".join(f"{candidate}: {state}" for candidate, state in candidates)
    raise BackendUnavailableError(
        f"{name}: backend {wanted!r} cannot run on {device_type} here ({tried}); see `rtsvm info`"
    )
