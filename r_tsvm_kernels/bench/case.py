"""A benchmark case: inputs, providers of one result, its true value, and the bytes and flops that it needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from .. import backends
from ..dispatch import explain, ops, use_backend
from .measure import Call, leaves, worst_error

Role = Literal["ours", "reference", "torch", "peer"]
Ceiling = Literal["copy", "matmul"]
# Returns the error of a result (first) against the truth (second).
Judge = Callable[[Sequence[Tensor], Sequence[Tensor]], float]

# All values are multiples of GRID and at most LARGEST, so differences are exact in float32 and float64 selects the same
# elements, ties included.
GRID, LARGEST = 2.0**-26, 2.0**-3
TIMED_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Inputs:
    """A weight and fine-tunes of it; the same fields give the same values.

    Attributes:
        matrix: label of the shape, e.g. ``Mistral-7B q_proj``.
        shape: (rows, columns).
        dtype: of the weights, a key of `TIMED_DTYPES`.
        tasks: number of fine-tunes.
        device: where the tensors are.
        decaying: whether the singular values of the task vectors fall roughly as ``i ** -0.5``, as after training.
    """

    matrix: str
    shape: tuple[int, int]
    dtype: str
    tasks: int
    device: torch.device
    decaying: bool = False

    @cached_property
    def base(self) -> Tensor:
        """The weight."""
        return self._random(0.02, 0, None)

    @cached_property
    def tuned(self) -> list[Tensor]:
        """The fine-tunes; their distance from the weight is a twentieth of its norm."""
        return [self._random(1e-3, 1 + task, self.base) for task in range(self.tasks)]

    @cached_property
    def deltas(self) -> list[Tensor]:
        """The task vectors, float32."""
        return [tensor.float() - self.base.float() for tensor in self.tuned]

    @property
    def exact(self) -> tuple[Tensor, list[Tensor]]:
        """The weight and the fine-tunes in float64."""
        return self.base.double(), [tensor.double() for tensor in self.tuned]

    @property
    def numel(self) -> int:
        """Elements of the weight."""
        return self.base.numel()

    @property
    def read_bytes(self) -> int:
        """Size of the weight and the fine-tunes."""
        return self.base.nbytes * (1 + self.tasks)

    def _random(self, scale: float, seed: int, around: Tensor | None) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(seed)
        values = scale * torch.randn(self.shape, generator=generator, device=self.device)
        if around is not None:
            if self.decaying:
                places = torch.arange(1, self.shape[1] + 1, device=self.device).float().rsqrt()
                values *= places / places.square().mean().sqrt()
            values += around.float()
        return ((values / GRID).round() * GRID).clamp(-LARGEST, LARGEST).to(TIMED_DTYPES[self.dtype])


@dataclass(frozen=True)
class Provider:
    """One way to the result.

    Attributes:
        name: our backend or solver, a library, or a version in torch.
        run: computes the result.
        role: ``ours``; ``reference``: plain eager torch; ``torch``: hand-optimised or compiled torch; ``peer``: another
            library.
        limit: largest error, if it differs from that of the case; or computes it from the truth.
        error: computes the error.
        compared: the part of the result that `error` compares with the truth.
        compiles: whether the first run compiles the code.
    """

    name: str
    run: Call
    role: Role = "ours"
    limit: float | Callable[[Sequence[Tensor]], float] | None = None
    error: Judge = worst_error
    compared: str = "all elements"
    compiles: bool = False


@dataclass(frozen=True)
class Case:
    """One benchmark on one input.

    Attributes:
        inputs: the input.
        providers: all that can run here.
        truth: computes the true values in float64, or integers.
        values: takes from a result the tensors that are compared with the truth.
        limit: largest relative error of a right result.
        bytes: least number of bytes that must be read and written.
        flops: least number of operations; 0 if bytes bound the speed.
        ceiling: what bounds the speed.
        unavailable: backends that cannot run here, and why.
    """

    inputs: Inputs
    providers: Sequence[Provider]
    truth: Callable[[], Sequence[Tensor]]
    limit: float
    bytes: int
    values: Callable[[object], Sequence[Tensor]] = leaves
    flops: float = 0.0
    ceiling: Ceiling = "copy"
    unavailable: dict[str, str] = field(default_factory=dict)


@contextmanager
def all_on(backend: str, device_type: str) -> Iterator[None]:
    """Run every op on `backend` if it has the op and can run; on the reference otherwise."""
    choice = {op: backend if dict(explain(op, device_type)).get(backend) == backends.READY else "torch" for op in ops()}
    with use_backend(**choice):
        yield


def by_backend(ops: Sequence[str], call: Call, device: torch.device) -> tuple[list[Provider], dict[str, str]]:
    """Return a provider for each backend that has one of the ops and can run, and the reasons why others cannot."""
    found, unavailable = [], {}
    for backend in ("cpu", "cuda", "triton", "cublas"):
        states = [dict(explain(op, device.type)).get(backend) for op in ops]
        if backends.READY in states:
            found.append(Provider(backend, on_backend(backend, call, device)))
        elif any(states):
            unavailable[backend] = next(state for state in states if state)
    return [*found, Provider("reference", on_backend("torch", call, device), "reference")], unavailable


def on_backend(backend: str, call: Call, device: torch.device) -> Call:
    """Return the call with every op on `backend`."""

    def run() -> object:
        with all_on(backend, device.type):
            return call()

    return run
