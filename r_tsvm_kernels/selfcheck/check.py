"""Check the kernels of one op on one device, in this process."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ..bench import REGISTRY, Stopwatch, interleaved
from ..bench import Case as Benchmark
from ..bench.case import Inputs
from ..dispatch import Op, ops
from ..ops._cases import difference, distance, same_bits, tensors_in
from ..verdicts.store import Verdict
from .hard_cases import hard_cases

# Shapes of the weights on which kernels are compared and timed; and of odd ones, of several blocks of every kernel.
REALISTIC = {"cuda": (4096, 4096), "cpu": (1024, 1024)}
ODD = (1031, 517)
TASKS = 3
ROUNDS = 5

# Read by `verdicts.children`.
Line = dict[str, Any]


@dataclass(frozen=True)
class Trial:
    """A call of the op, and how its result is judged.

    Attributes:
        label: what is hard about it.
        run: calls the op with a backend.
        raises: the error that it must raise; None for a result.
        judge: returns the error of a result, and what is wrong with it, if anything.
        inputs: tensors that the call must leave as they are.
    """

    label: str
    run: Callable[[str], object]
    raises: type[Exception] | None
    judge: Callable[[object], tuple[float, str | None]]
    inputs: Sequence[Tensor] = ()


def check_op(name: str, kernels: Sequence[str], device: torch.device) -> Iterator[Line]:
    """Check kernels of an op, then time those that passed beside the reference.

    Args:
        name: of the op.
        kernels: backends, without the reference.
        device: where.

    Yields:
        Before each step the kernels that it runs; after it what was found: verdicts, kernels for whose check there was
        no memory, or seconds.
    """
    op = ops()[name]
    trials, passed = list[Trial](), list[str]()
    for kernel in kernels:
        yield {"op": name, "begins": [kernel]}
        try:
            trials = trials or [*_hard_trials(op, device), *_large_trials(op, device)]
            verdict = _verdict(trials, kernel, device)
        except torch.cuda.OutOfMemoryError:  # says nothing about the kernel
            yield {"op": name, "unchecked": [kernel]}
            continue
        passed += [kernel] if verdict.passed else []
        yield {"op": name, "verdicts": {kernel: asdict(verdict)}}
    if passed:
        yield {"op": name, "begins": passed}
        yield {"op": name, "seconds": _times(op, passed, device)}


def _verdict(trials: Sequence[Trial], kernel: str, device: torch.device) -> Verdict:
    start, worst = time.perf_counter(), 0.0
    for count, trial in enumerate(trials, 1):
        error, wrong = _outcome(trial, kernel, device)
        worst = max(worst, error)
        if wrong is not None:
            known = worst if math.isfinite(worst) else None
            return Verdict(False, f"{trial.label}: {wrong}", known, None, count, time.perf_counter() - start)
    return Verdict(True, "", worst, None, len(trials), time.perf_counter() - start)


def _outcome(trial: Trial, kernel: str, device: torch.device) -> tuple[float, str | None]:
    """Return the error of a kernel in a trial, and what is wrong."""
    before = [x.clone() for x in trial.inputs]
    try:
        got = trial.run(kernel)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:  # of the op, of a compiler, of the driver
        if trial.raises is not None and isinstance(error, trial.raises):
            return 0.0, None
        return 0.0, f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:300]}"
    if trial.raises is not None:
        return 0.0, f"accepted, where {trial.raises.__name__} is expected"
    if not all(map(same_bits, trial.inputs, before)):
        return 0.0, "it changes its inputs"
    return trial.judge(got)


def _hard_trials(op: Op[..., Any], device: torch.device) -> Iterator[Trial]:
    """Yield the op's own hard cases, to be judged by its rule of equality."""
    for case in hard_cases(import_module(f"{op.__module__}.cases").cases(device)):

        def run(backend: str, case: Any = case) -> object:
            return op(*case.args, **case.options, backend=backend)

        expected = None if case.raises else run("torch")
        read = {name: value for name, value in case.options.items() if name != "out"}  # whose memory is used again
        inputs = list(tensors_in([case.args, read]))
        yield Trial(case.label, run, case.raises, _judged_as(op, expected), inputs)


def _judged_as(op: Op[..., Any], expected: object) -> Callable[[object], tuple[float, str | None]]:
    def judge(got: object) -> tuple[float, str | None]:
        wrong = difference(op, got, expected)
        # Equal bits need no second look.
        return (0.0 if wrong is None and op.accuracy is None else distance(got, expected)), wrong

    return judge


def _large_trials(op: Op[..., Any], device: torch.device) -> Iterator[Trial]:
    """Yield the op's benchmarks on an odd and on a realistic shape.

    Equal bits are compared with the reference; other results with float64, by the limit of the benchmark: errors grow
    with the size.
    """
    for shape in (ODD, REALISTIC[device.type]):
        for label, benchmark in _benchmarks(op, shape, device):
            calls = {provider.name: provider.run for provider in benchmark.providers}

            def run(backend: str, calls: dict[str, Callable[[], object]] = calls) -> object:
                return calls[backend]()

            judge = _judged_as(op, calls["reference"]()) if op.accuracy is None else _judged_by(benchmark)
            yield Trial(label, run, None, judge)


def _judged_by(benchmark: Benchmark) -> Callable[[object], tuple[float, str | None]]:
    truth = benchmark.truth()
    ours = next(provider for provider in benchmark.providers if provider.role in ("ours", "reference"))

    def judge(got: object) -> tuple[float, str | None]:
        error = ours.error(benchmark.values(got), truth)
        wrong = f"relative error {error:.1e}, expected at most {benchmark.limit:.1e}"
        return error, None if error <= benchmark.limit else wrong

    return judge


def _benchmarks(op: Op[..., Any], shape: tuple[int, int], device: torch.device) -> Iterator[tuple[str, Benchmark]]:
    inputs = Inputs("self-check", shape, "bfloat16", TASKS, device)
    for name, entry in REGISTRY.items():
        if name.partition(":")[0] == op.name:
            yield f"{name}, {shape[0]}x{shape[1]}", entry.make(inputs)


def _times(op: Op[..., Any], passed: Sequence[str], device: torch.device) -> dict[str, float]:
    """Return the seconds of kernels and reference for one call of each benchmark of the op at the realistic size.

    All are timed in turn; the shortest time of each counts, because other work only adds to it.
    """
    stopwatch, total = Stopwatch(device), dict.fromkeys(["torch", *passed], 0.0)
    for _, benchmark in _benchmarks(op, REALISTIC[device.type], device):
        calls = {provider.name: provider.run for provider in benchmark.providers}
        timed = {"torch": calls["reference"], **{kernel: calls[kernel] for kernel in passed}}
        interleaved(timed, 1, stopwatch)
        for backend, seconds in interleaved(timed, ROUNDS, stopwatch).items():
            total[backend] += min(seconds)
    return total
