"""Other libraries' own functions for the same merges: providers of role ``peer``, where they are installed.

Libraries are found without an import, and imported when a case uses them. mergekit gets the weights in their dtype, in
which it computes. FusionBench and PEFT get task vectors in float32; forming them is timed, because our functions form
them too.

A function is a peer only if its parameters mean the same as ours. mergekit's DELLA is not one: it rescales all
surviving elements by one factor; ours, as published, rescales each by its own probability. PEFT's DARE-TIES is not one:
it takes a mean, ours a sum. mergekit's SCE in float16 fails our check, rightly: the variances by which it selects are
subnormal.
"""

from __future__ import annotations

import contextlib
import io
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import IntegrationError
from ..linalg import Factored
from ..methods import METHODS
from .case import Case, Inputs, Judge, Provider
from .measure import Call, worst_error
from .merges import ADAPTER_WEIGHTS, ELEMENT_WISE, operands
from .published import COMMON_SPACE
from .registry import Benchmark
from .spectral import FLOAT32_SVD, lora_set

# Makes the provider of this name for a case.
Maker = Callable[[str, Case], Provider]

# Results in the dtype of the weights lose at least what rounding the exact result to it costs, and sums in it a few
# roundings of the update; mergekit's Karcher mean, the worst, lost 1.9 times the former.
ROUNDINGS = 2.0
# Its norms and cosines are float32 sums of millions; an angle between almost parallel weights loses more (2e-4 seen).
ANGLE, OF_ANGLES = 1e-3, {"model_stock", "slerp", "multislerp", "karcher"}
# Norms and projections of two draws of one merge agree to a percent, plus a few standard deviations for small tensors.
DRAWS, DEVIATIONS = 0.01, 6.0
UNTIED = "elements that are tied neither at a threshold nor in their votes"
STATISTICS = "norm, and projection on the sum of the task vectors: other random masks"


def installed(package: str) -> str | None:
    """Return the version of a package that can be imported; None if there is none. Nothing is imported."""
    module = package.replace("-", "_")
    if module not in sys.modules:  # FusionBench, once imported, has no spec
        spec = find_spec(module)
        if spec is None or spec.origin is None:  # a folder of that name is no package
            return None
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def taking_part(benchmarks: Sequence[Benchmark]) -> list[str]:
    """Return the installed packages that are peers in one of the benchmarks."""
    return [
        name for name, makers in PEERS.items() if any(entry.name in makers for entry in benchmarks) and installed(name)
    ]


def with_peers(name: str, case: Case) -> Case:
    """Return the case of this benchmark with the installed peers.

    A peer that does not load or has another interface becomes a provider that fails with the reason.
    """
    found: list[Provider] = []
    for package, makers in PEERS.items():
        number = installed(package) if name in makers else None
        if number is None:
            continue
        label = f"{package} {number}"
        try:
            with _quiet():
                provider = makers[name](label, case)
            found.append(replace(provider, run=partial(_run, provider.run)))
        except Exception as error:  # a broken peer does not stop the benchmark
            found.append(Provider(label, partial(_fail, f"does not load: {type(error).__name__}: {error}"), "peer"))
    return replace(case, providers=[*case.providers, *found])


def _run(call: Call) -> Any:
    with _quiet(), torch.no_grad():
        try:
            return call()
        except Exception as error:
            raise IntegrationError(f"{type(error).__name__}: {error}") from error


def _fail(reason: str) -> None:
    raise IntegrationError(reason)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep output and warnings of a library out of our table."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# --- what is a right result ----------------------------------------------------------------------------------------


def rounding_limit(least: float, base: Tensor) -> Callable[[Sequence[Tensor]], float]:
    """Return a function from the true update to the error allowed in the dtype of the base, at least `least`."""

    def limit(truth: Sequence[Tensor]) -> float:
        (update,) = truth
        weight = base.double() + update
        rounding = worst_error([weight.to(base.dtype).double() - base.double()], truth)
        return max(least, ROUNDINGS * (rounding + torch.finfo(base.dtype).eps / 2))

    return limit


def apart_from_ties(base: Tensor, tuned: Sequence[Tensor], counts: Sequence[int], dtype: torch.dtype) -> Judge:
    """Return a judge of all elements except those that libraries treat differently.

    Those are within a rounding of a threshold of a task, where any may be kept, or their votes cancel up to rounding,
    where either sign may be elected.

    Args:
        base: the weight.
        tuned: its fine-tunes.
        counts: numbers of elements of a task vector above the threshold, and above that of outliers if there is one;
            rounded down, although some libraries round up.
        dtype: in which task vectors are formed and compared.
    """

    def error(found: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
        if any(x.shape != base.shape for x in found):
            return float("inf")
        apart = torch.ones_like(base, dtype=torch.bool)
        votes, turnout = (torch.zeros_like(base, dtype=torch.float64) for _ in range(2))
        eps = torch.finfo(dtype).eps
        for tensor in tuned:
            delta = tensor.double() - base.double()
            magnitude, kept = delta.abs(), torch.ones_like(apart)
            falling = magnitude.flatten().sort(descending=True).values
            for index, count in enumerate(counts):
                high, low = falling[max(0, count - 2)], falling[min(count + 1, len(falling) - 1)]
                apart &= (magnitude > high * (1 + eps)) | (magnitude < low * (1 - eps))
                kept &= (magnitude >= high) ^ (index > 0)
            votes += delta * kept
            turnout += magnitude * kept
        apart &= (votes.abs() > eps * turnout) | (turnout == 0)
        return worst_error([x[apart] for x in found], [x[apart] for x in truth])

    return error


def by_statistics(inputs: Inputs) -> Judge:
    """Return a judge of a merge with other random masks, by statistics in which all draws agree."""

    def error(found: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
        (x,), (y,) = found, truth
        if x.shape != y.shape:
            return float("inf")
        total = torch.stack(inputs.deltas).sum(0, dtype=torch.float64)
        shares = torch.stack([x.norm() / y.norm(), (x * total).sum() / (y * total).sum()])
        worst = float((shares - 1).abs().max())
        return worst if worst == worst else float("inf")

    return error


def draws_limit(inputs: Inputs) -> float:
    """Return by how much the statistics of two draws may differ."""
    return DRAWS + DEVIATIONS / math.sqrt(inputs.numel)


def thresholds(name: str, numel: int) -> list[int]:
    """Return how many elements a method keeps above each of its thresholds; none for methods without."""
    parameters = ELEMENT_WISE[name][1]
    if "density" not in parameters or name.startswith("dare"):
        return []
    kept, dropped = int(parameters["density"] * numel), int(parameters.get("gamma", 0.0) * numel)
    return [kept + dropped, dropped] if dropped else [kept]


# --- mergekit ------------------------------------------------------------------------------------------------------

# Parameters in addition to those of our benchmark.
_WEIGHTED: dict[str, Any] = {"weight": 1.0}
MERGEKIT: dict[str, dict[str, Any]] = {
    "linear": _WEIGHTED, "task_arithmetic": _WEIGHTED, "ties": _WEIGHTED, "dare_linear": _WEIGHTED,
    "dare_ties": _WEIGHTED, "breadcrumbs": _WEIGHTED, "breadcrumbs_ties": _WEIGHTED, "model_stock": {}, "sce": {},
    "slerp": {"t": 0.5}, "multislerp": _WEIGHTED, "karcher": {},
}  # fmt: skip


def _mergekit(label: str, case: Case, *, name: str) -> Provider:
    from mergekit.merge_methods import merge_tensors

    base, tuned = operands(case.inputs, name)
    has_base = METHODS[name].forms_vectors(True)
    own = {"lambda" if key == "alpha" else key: value for key, value in ELEMENT_WISE[name][1].items()}
    run = partial(
        merge_tensors,
        [base, *tuned] if has_base else tuned,
        name,
        parameters=own | MERGEKIT[name],
        base_index=0 if has_base else None,
    )
    if name.startswith("dare"):
        return Provider(label, run, "peer", draws_limit(case.inputs), by_statistics(case.inputs), STATISTICS)
    provider = Provider(label, run, "peer", rounding_limit(ANGLE if name in OF_ANGLES else case.limit, base))
    counts = thresholds(name, case.inputs.numel)
    if not counts:
        return provider
    return replace(provider, error=apart_from_ties(base, tuned, counts, base.dtype), compared=UNTIED)


# --- FusionBench and PEFT, which merge task vectors ----------------------------------------------------------------


def _added(inputs: Inputs, merge: Callable[[list[Tensor]], Tensor]) -> Call:
    """Return the merge of weights by a function of task vectors."""

    def run() -> Tensor:
        base = inputs.base.float()
        return base + merge([tensor.float() - base for tensor in inputs.tuned])

    return run


def _ties(label: str, case: Case, merge: Callable[[list[Tensor]], Tensor]) -> Provider:
    inputs = case.inputs
    judge = apart_from_ties(inputs.base, inputs.tuned, thresholds("ties", inputs.numel), torch.float32)
    return Provider(label, _added(inputs, merge), "peer", None, judge, UNTIED)


def _fusion_bench_ties(label: str, case: Case) -> Provider:
    from fusion_bench.method.ties_merging.ties_merging_utils import ties_merging

    percent = 100 * ELEMENT_WISE["ties"][1]["density"]

    def merge(deltas: list[Tensor]) -> Tensor:
        flat = torch.stack([delta.flatten() for delta in deltas])
        merged: Tensor = ties_merging(flat, reset_thresh=percent, merge_func="dis-mean")
        return merged.view_as(deltas[0])

    return _ties(label, case, merge)


def _fusion_bench_svd(label: str, case: Case, *, name: str) -> Provider:
    from fusion_bench.method.isotropic_merging.iso_utils import iso_c, iso_cts
    from fusion_bench.method.task_singular_vector.utils.TSVM_utils import compute_and_sum_svd_mem_reduction

    function = {
        "tsvm": compute_and_sum_svd_mem_reduction,
        "iso_c": iso_c,
        "iso_cts": partial(iso_cts, common_space_fraction=COMMON_SPACE),
    }[name]

    def merge(deltas: list[Tensor]) -> Tensor:
        merged: Tensor = function([{"weight": delta} for delta in deltas], accelerator=case.inputs.device)["weight"]
        return merged

    return Provider(label, _added(case.inputs, merge), "peer", FLOAT32_SVD)


def _peft_ties(label: str, case: Case) -> Provider:
    from peft.utils.merge_utils import ties

    ones = torch.ones(case.inputs.tasks, device=case.inputs.device)
    return _ties(label, case, lambda deltas: ties(deltas, ones, ELEMENT_WISE["ties"][1]["density"]))


def _peft_dare_linear(label: str, case: Case) -> Provider:
    from peft.utils.merge_utils import dare_linear

    inputs, density = case.inputs, ELEMENT_WISE["dare_linear"][1]["density"]
    ones = torch.ones(inputs.tasks, device=inputs.device)
    run = _added(inputs, lambda deltas: dare_linear(deltas, ones, density))
    return Provider(label, run, "peer", draws_limit(inputs), by_statistics(inputs), STATISTICS)


def _peft_svd(label: str, case: Case) -> Provider:
    """Adapters of a model of one layer, with PEFT's defaults, its full SVD included."""
    from peft import LoraConfig, get_peft_model

    adapters, (m, n) = lora_set(case.inputs), case.inputs.shape
    rank, names = adapters[0].left.shape[1], [f"task{index}" for index in range(len(adapters))]
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=["layer"])
    layer = nn.ModuleDict({"layer": nn.Linear(n, m, bias=False, device=case.inputs.device)})
    model: Any = get_peft_model(layer, config, names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    tuner = model.base_model.model["layer"]
    for name, adapter in zip(names, adapters, strict=True):
        tuner.lora_A[name].weight.data, tuner.lora_B[name].weight.data = adapter.right, adapter.left

    def run() -> Factored:
        weights = list(ADAPTER_WEIGHTS[: len(names)])
        model.add_weighted_adapter(names, weights, "merged", combination_type="svd", svd_rank=rank)
        factors = [factor["merged"].weight.detach() for factor in (tuner.lora_B, tuner.lora_A)]
        model.delete_adapter("merged")
        return Factored(*factors)

    return Provider(label, run, "peer", FLOAT32_SVD)


# By package, as pip knows it, and benchmark.
PEERS: dict[str, dict[str, Maker]] = {
    "mergekit": {name: partial(_mergekit, name=name) for name in MERGEKIT},
    "fusion-bench": {name: partial(_fusion_bench_svd, name=name) for name in ("tsvm", "iso_c", "iso_cts")}
    | {"ties": _fusion_bench_ties},
    "peft": {"ties": _peft_ties, "dare_linear": _peft_dare_linear, "combine_adapters: svd": _peft_svd},
}
