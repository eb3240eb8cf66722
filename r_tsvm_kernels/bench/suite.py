"""Run benchmarks: check every provider against float64, then time the right ones in turn."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from .case import Case, Inputs, Provider
from .ceilings import measure_ceilings
from .measure import Call, Stopwatch, interleaved, leaves, peak_extra_bytes, plan_rounds
from .peers import with_peers
from .published import exact_svd
from .registry import Benchmark, Kind
from .results import Results, Row, ratios, row
from .shapes import matrix

HEAVY = 0.3  # seconds; loading libraries does not matter in a call that takes longer


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        name: ``quick``, ``full`` or ``dry-run``.
        matrices: labels of the shapes, by kind of benchmark; followed by `DECAYING` for such a spectrum.
        dtypes: of the first matrix of each kind; all others are bfloat16.
        seconds: target timing budget per provider.
        tasks: number of fine-tunes.
        rounds: minimum number of rounds, unless a case is very slow (`measure.LONGEST`).
        compile: whether to run torch.compile on a CPU, where compiling takes half a minute.
    """

    name: str
    matrices: dict[Kind, tuple[str, ...]]
    dtypes: tuple[str, ...]
    seconds: float
    tasks: int = 3
    rounds: int = 5
    compile: bool = False


PLANS = {
    plan.name: plan
    for plan in (
        Plan(
            "quick",
            {"element-wise": ("Qwen2.5-7B k_proj",), "spectral": ("ViT-B/32 attention",)},
            ("bfloat16",),
            seconds=0.2,
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
        Plan("dry-run", {"element-wise": ("tiny",), "spectral": ("tiny",)}, ("bfloat16",), seconds=0.0, rounds=3),
    )
}
TINY = (24, 16)
DECAYING = ", decaying spectrum"


def inputs_of(plan: Plan, kind: Kind, device: torch.device) -> Iterator[Inputs]:
    """Yield the inputs on which the benchmarks of a kind are run."""
    for index, label in enumerate(plan.matrices[kind]):
        for dtype in plan.dtypes if index == 0 else plan.dtypes[:1]:
            of = label.removesuffix(DECAYING)
            yield Inputs(label, TINY if of == "tiny" else matrix(of), dtype, plan.tasks, device, of != label)


def run_suite(
    benchmarks: Sequence[Benchmark],
    plan: Plan,
    device: torch.device,
    results: Results,
    progress: Callable[[str], None] = lambda what: None,
) -> list[Row]:
    """Run benchmarks and return their rows.

    Args:
        benchmarks: to be run.
        plan: on what, and for how long.
        device: where.
        results: where rows are added after every benchmark, so that a run that is stopped keeps them in its file.
        progress: called with what comes next.

    Returns:
        The ceilings, then the rows of every case (see `run_case`), complete with their circumstances.
    """
    progress("copies and matrix products")
    ceilings = measure_ceilings(device, plan.name == "dry-run")
    results.add(ceilings)
    bounds = {found["name"]: found["median"] for found in ceilings}
    stopwatch = Stopwatch(device)
    for kind in plan.matrices:
        for inputs in inputs_of(plan, kind, device):
            for entry in (entry for entry in benchmarks if entry.kind == kind):
                progress(f"{entry.name}, {inputs.matrix}, {inputs.dtype}")
                try:
                    case = with_peers(entry.name, entry.make(inputs))
                    rows = run_case(entry.name, case, stopwatch, bounds, plan)
                    del case
                except Exception as failure:  # of the inputs or of the truth: the other benchmarks still count
                    rows = [_without_time(_described(entry.name, inputs), "inputs", "ours", "failed", _reason(failure))]
                results.add(rows)
                gc.collect()  # a case holds closures over its tensors
            exact_svd.cache_clear()
    return results.rows


class _Checked(NamedTuple):
    seconds: float
    error: float
    peak_extra_bytes: int | None
    failure: str | None


def run_case(name: str, case: Case, stopwatch: Stopwatch, ceilings: Mapping[str, float], plan: Plan) -> list[Row]:
    """Check and time all providers of a case.

    Returns:
        By provider, rows of the metrics ``time``, ``speed-up`` (time of the reference, and of peers, / time, by
        rounds), ``share`` of the ceiling, ``memory`` besides inputs and result, and ``error``. All providers are timed
        in the same rounds. A time that was not measured has notes: ``status`` is ``wrong`` (too far from float64),
        ``failed`` (an exception) or ``unavailable`` (it cannot run here), and ``reason`` says why.
    """
    common = _described(name, case.inputs)
    providers = [p for p in case.providers if plan.compile or not p.compiles or case.inputs.device.type == "cuda"]
    truth = case.truth()
    checked = {provider.name: _check(provider, case, truth, stopwatch) for provider in providers}
    limits = {provider.name: _limit(provider, case, truth) for provider in providers}
    del truth
    right = {
        provider.name: provider.run
        for provider in providers
        if checked[provider.name].failure is None and checked[provider.name].error <= limits[provider.name]
    }
    times = _timed(right, checked, stopwatch, plan)
    compared = [p.name for role in ("reference", "peer") for p in providers if p.role == role and p.name in right]
    rows = []
    for provider in providers:
        found, limit = checked[provider.name], limits[provider.name]
        own = common | {"role": provider.role}
        if found.failure is not None:
            rows.append(_without_time(common, provider.name, provider.role, "failed", found.failure))
            continue
        rows.append(row(provider=provider.name, metric="error", values=found.error, **own,
                        notes={"limit": limit, "compared": provider.compared}))  # fmt: skip
        if provider.name not in right:
            reason = f"error {found.error:.1e}, allowed {limit:.0e}"
            rows.append(_without_time(common, provider.name, provider.role, "wrong", reason))
            continue
        samples = times[provider.name]
        work = {"bytes": case.bytes} | ({"flops": case.flops} if case.ceiling == "matmul" else {})
        rows.append(row(provider=provider.name, metric="time", values=samples, **own, notes=work))
        for other in compared if provider.role == "ours" else compared[:1]:
            if other != provider.name:
                rows.append(row(provider=provider.name, metric="speed-up", values=ratios(times[other], samples), **own,
                                notes={"against": other}))  # fmt: skip
        if provider.role == "ours":
            done = case.flops if case.ceiling == "matmul" else float(case.bytes)
            shares = [done / value / ceilings[case.ceiling] for value in samples]
            rows.append(row(provider=provider.name, metric="share", values=shares, **own, notes={"of": case.ceiling}))
        if found.peak_extra_bytes is not None:
            rows.append(row(provider=provider.name, metric="memory", values=found.peak_extra_bytes, **own))
    missing = [_without_time(common, name, "ours", "unavailable", reason) for name, reason in case.unavailable.items()]
    return rows + missing


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
    except Exception as failure:  # compilers and libraries may raise anything; the failure is a result
        return _Checked(0.0, float("inf"), None, _reason(failure))


def _described(name: str, inputs: Inputs) -> dict[str, Any]:
    """Return what all rows of a case have in common."""
    options = {"matrix": inputs.matrix, "tasks": inputs.tasks, "device": inputs.device.type}
    return {"name": name, "shape": inputs.shape, "dtype": inputs.dtype, "options": options}


def _without_time(common: Mapping[str, Any], provider: str, role: str, status: str, reason: str) -> Row:
    return row(provider=provider, metric="time", values=None, role=role, notes={"status": status, "reason": reason},
               **common)  # fmt: skip


def _reason(failure: Exception) -> str:
    lines = str(failure).splitlines()
    return f"{type(failure).__name__}: {lines[0] if lines else ''}"


def _timed(
    calls: dict[str, Call], checked: dict[str, _Checked], stopwatch: Stopwatch, plan: Plan
) -> dict[str, list[float]]:
    """Return the seconds of all calls, in the same rounds."""
    # The first call includes looking at its memory, and loading libraries.
    one = {
        name: checked[name].seconds if checked[name].seconds > HEAVY else stopwatch.seconds(call)
        for name, call in calls.items()
    }
    rounds, repeats = plan_rounds(one, plan.seconds, plan.rounds)
    return interleaved(calls, rounds, stopwatch, repeats)
