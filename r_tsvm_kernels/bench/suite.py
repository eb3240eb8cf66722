"""Run benchmarks: check every provider against float64, then time the right ones in turn."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from .case import Case, Inputs, Provider
from .ceilings import measure_ceilings
from .measure import Call, Stopwatch, interleaved, leaves, peak_extra_bytes, plan_rounds
from .peers import taking_part, with_peers
from .published import exact_svd
from .record import provenance, quartiles, ratios
from .registry import Benchmark, Kind
from .shapes import matrix

SCHEMA = 1
SLOW = 5.0  # seconds; a call that takes longer is timed once
HEAVY = 0.3  # seconds; loading libraries does not matter in a call that takes longer


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        name: ``quick``, ``full`` or ``dry-run``.
        matrices: labels of the shapes, by kind of benchmark.
        dtypes: of the first matrix of each kind; all others are bfloat16.
        seconds: for which a provider is timed, about;
        rounds: but so often at least.
        tasks: number of fine-tunes.
        compile: whether torch.compile takes part on a CPU, where it takes half a minute to begin with.
    """

    name: str
    matrices: dict[Kind, tuple[str, ...]]
    dtypes: tuple[str, ...]
    seconds: float
    tasks: int = 3
    rounds: int = 3
    compile: bool = False


PLANS = {
    plan.name: plan
    for plan in (
        Plan(
            "quick",
            {"element-wise": ("Qwen2.5-7B k_proj",), "spectral": ("ViT-B/32 attention",)},
            ("bfloat16",),
            seconds=0.2,
            rounds=2,
        ),
        Plan(
            "full",
            {
                "element-wise": (
                    "Mistral-7B q_proj",
                    "Llama-3-8B gate_proj",
                    "Qwen2.5-7B k_proj",
                    "ViT-B/32 mlp_in",
                    "SDXL 1280 ff_geglu",
                ),
                "spectral": ("ViT-B/32 attention", "ViT-B/32 mlp_in", "SDXL 1280 cross_attn_kv", "Mistral-7B k_proj"),
            },
            ("bfloat16", "float16", "float32"),
            seconds=2.0,
            compile=True,
        ),
        Plan("dry-run", {"element-wise": ("tiny",), "spectral": ("tiny",)}, ("bfloat16",), seconds=0.0),
    )
}
TINY = (24, 16)


def inputs_of(plan: Plan, kind: Kind, device: torch.device) -> Iterator[Inputs]:
    """Yield the inputs on which the benchmarks of a kind are run."""
    for index, label in enumerate(plan.matrices[kind]):
        for dtype in plan.dtypes if index == 0 else plan.dtypes[:1]:
            yield Inputs(label, TINY if label == "tiny" else matrix(label), dtype, plan.tasks, device)


def run_suite(
    benchmarks: Sequence[Benchmark],
    plan: Plan,
    device: torch.device,
    keep: Callable[[dict[str, Any]], None] = lambda report: None,
    progress: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """Run benchmarks and return the report.

    Args:
        benchmarks: to be run.
        plan: on what, and for how long.
        device: where.
        keep: called with the report after every benchmark, so that a run that is cut off keeps what it has.
        progress: called with what comes next.

    Returns:
        Where and when, the ceilings, and one row per benchmark, input and provider (see `run_case`).
    """
    progress("what the machine can do at most")
    dry_run = plan.name == "dry-run"
    report = provenance(*taking_part(benchmarks)) | {
        "schema": SCHEMA,
        "suite": plan.name,
        "device": device.type,
        "complete": False,
        "ceilings": measure_ceilings(device, dry_run),
        "rows": [],
    }
    keep(report)
    stopwatch = Stopwatch(device)
    for kind in plan.matrices:
        for inputs in inputs_of(plan, kind, device):
            for entry in (entry for entry in benchmarks if entry.kind == kind):
                progress(f"{entry.name}, {inputs.matrix}, {inputs.dtype}")
                try:
                    case = with_peers(entry.name, entry.make(inputs))
                    rows = run_case(entry.name, case, stopwatch, report["ceilings"], plan)
                    del case
                except Exception as failure:  # of the inputs or of the truth: the other benchmarks still count
                    rows = [
                        _described(entry.name, inputs)
                        | {"provider": "inputs", "role": "ours", "status": "failed", "reason": _reason(failure)}
                    ]
                report["rows"] += rows
                keep(report)
                gc.collect()  # a case holds closures over its tensors
            exact_svd.cache_clear()
    report["complete"] = True
    keep(report)
    return report


class _Checked(NamedTuple):
    seconds: float
    error: float
    peak_extra_bytes: int | None
    failure: str | None


def run_case(
    name: str, case: Case, stopwatch: Stopwatch, ceilings: dict[str, float], plan: Plan
) -> list[dict[str, Any]]:
    """Check and time all providers of a case.

    Returns:
        One row per provider. ``status`` is ``timed``; ``wrong``: too far from float64, and not timed for that;
        ``failed``: an exception; or ``unavailable``: it cannot run here; ``reason`` says why. Times are in
        ``seconds`` (median, quartiles, rounds), ``speedup`` is that over the reference by rounds, ``share`` the part of
        the ceiling that is reached.
    """
    common = _described(name, case.inputs)
    providers = [p for p in case.providers if plan.compile or not p.compiles or case.inputs.device.type == "cuda"]
    truth = case.truth()
    rows: dict[str, dict[str, Any]] = {}
    checked: dict[str, _Checked] = {}
    for provider in providers:
        limit = _limit(provider, case, truth)
        found = _check(provider, case, truth, stopwatch)
        rows[provider.name] = common | {
            "provider": provider.name, "role": provider.role, "status": "timed", "error": found.error, "limit": limit,
            "compared": provider.compared,
        }  # fmt: skip
        if found.failure is not None:
            rows[provider.name] |= {"status": "failed", "reason": found.failure}
        elif not found.error <= limit:
            rows[provider.name] |= {"status": "wrong", "reason": f"error {found.error:.1e}, allowed {limit:.0e}"}
        else:
            checked[provider.name] = found
            rows[provider.name]["peak_extra_bytes"] = found.peak_extra_bytes
    del truth

    calls = {provider.name: provider.run for provider in providers if provider.name in checked}
    times = _timed(calls, checked, stopwatch, plan)
    reference = next((p.name for p in providers if p.role == "reference" and p.name in checked), None)
    for runner, values in times.items():
        rows[runner] |= _speed(case, values, ceilings)
        if reference is not None:
            rows[runner]["speedup"] = ratios(times[reference], values)
    unavailable = [
        common | {"provider": backend, "role": "ours", "status": "unavailable", "reason": reason}
        for backend, reason in case.unavailable.items()
    ]
    return [*rows.values(), *unavailable]


def _limit(provider: Provider, case: Case, truth: Sequence[torch.Tensor]) -> float:
    if provider.limit is None:
        return case.limit
    return provider.limit(truth) if callable(provider.limit) else provider.limit


def _check(provider: Provider, case: Case, truth: Sequence[torch.Tensor], stopwatch: Stopwatch) -> _Checked:
    """Run a provider twice (heavy ones once): to see its result and load its libraries, then to see its memory."""
    device = case.inputs.device
    results: list[Any] = []
    untouched = [(tensor, tensor._version) for tensor in leaves(case.inputs)]  # how often torch has written into each

    def measured() -> None:
        results[:] = [peak_extra_bytes(provider.run, device)]

    try:
        if provider.compiles or device.type == "cuda":
            provider.run()  # or the time and memory of compiling would count
        first = stopwatch.seconds(measured)
        error = provider.error(case.values(results[0][0]), truth)
        if first < HEAVY:
            first = stopwatch.seconds(measured)
        if any(tensor._version != version for tensor, version in untouched):
            return _Checked(0.0, error, None, "changes its inputs, which are those of all others, too")
        return _Checked(first, error, results[0][1], None)
    except Exception as failure:  # a loss is a result, whatever compilers and libraries raise
        return _Checked(0.0, float("inf"), None, _reason(failure))


def _described(name: str, inputs: Inputs) -> dict[str, Any]:
    """Return what every row of a case begins with."""
    return {
        "name": name, "matrix": inputs.matrix, "shape": list(inputs.shape), "dtype": inputs.dtype,
        "tasks": inputs.tasks,
    }  # fmt: skip


def _reason(failure: Exception) -> str:
    lines = str(failure).splitlines()
    return f"{type(failure).__name__}: {lines[0] if lines else ''}"


def _timed(
    calls: dict[str, Call], checked: dict[str, _Checked], stopwatch: Stopwatch, plan: Plan
) -> dict[str, list[float]]:
    fast = {name: call for name, call in calls.items() if checked[name].seconds < SLOW}
    rounds, repeats = {}, {}
    for name, call in fast.items():
        first = checked[name].seconds  # with what it took to see the memory, and to load libraries
        one = first if first > HEAVY else stopwatch.seconds(call)
        rounds[name], repeats[name] = plan_rounds(one, plan.seconds, plan.rounds)
    times = interleaved(fast, rounds, stopwatch, repeats)
    return {name: times[name] if name in fast else [checked[name].seconds] for name in calls}


def _speed(case: Case, times: list[float], ceilings: dict[str, float]) -> dict[str, Any]:
    spread = quartiles(times)
    found: dict[str, Any] = {"seconds": spread, "bytes": case.bytes, "gb_per_s": case.bytes / spread["median"] / 1e9}
    done = float(case.bytes)
    if case.ceiling == "matmul":
        found |= {"flops": case.flops, "tflop_per_s": case.flops / spread["median"] / 1e12}
        done = case.flops
    return found | {"ceiling": case.ceiling, "share": done / spread["median"] / ceilings[case.ceiling]}
