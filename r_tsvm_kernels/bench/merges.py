"""Benchmarks of the merge methods: one weight matrix through `merge_tensors`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..config import MergeConfig
from ..linalg import Factored, choose_rank, tsv_merge_flops
from ..merge import merge_tensors
from ..methods import METHODS
from ..ops import pruned_sparsity, reweight_prune, task_statistics
from . import published
from .case import Case, Inputs, Provider, all_on, on_backend
from .element_wise import op_case
from .registry import benchmark
from .spectral import FLOAT32_SVD, PROMISED, lora_case, lora_set

# Of the update. Merged weights are float32 and twenty times as large as the updates.
ROUNDING = 1e-5

ELEMENT_WISE: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("linear", {}),
    "task_arithmetic": ("task_arithmetic", {"alpha": 0.4}),
    "ties": ("ties", {"density": 0.2}),
    "dare_linear": ("dare_linear", {"density": 0.5}),
    "dare_ties": ("dare_ties", {"density": 0.5}),
    "breadcrumbs": ("breadcrumbs", {"density": 0.9, "gamma": 0.01}),
    "breadcrumbs_ties": ("breadcrumbs_ties", {"density": 0.9, "gamma": 0.01}),
    "della_linear": ("della_linear", {"density": 0.5, "epsilon": 0.1}),
    "della": ("della", {"density": 0.5, "epsilon": 0.1}),
    "model_stock": ("model_stock", {}),
    "sce": ("sce", {"select_topk": 0.5}),
    "slerp": ("slerp", {}),
    "multislerp": ("multislerp", {}),
    "karcher": ("karcher", {}),
    "nuslerp": ("nuslerp", {}),
    "nearswap": ("nearswap", {"t": 1e-3}),
    "arcee_fusion": ("arcee_fusion", {}),
    "ram": ("ram", {}),
    "ramplus_tl": ("ramplus_tl", {}),
    "consensus_ta": ("consensus_ta", {}),
    "pcb": ("pcb", {"density": 0.2}),
    "passthrough": ("passthrough", {}),
}
ADAPTER_WEIGHTS = (1.0, 0.5, 0.25, 0.125)


def operands(inputs: Inputs, method: str) -> tuple[Tensor, list[Tensor]]:
    """Return the base and the models of a merge by this method.

    For orthogonal task vectors Model Stock would return the base. With one of the fine-tunes as the base, the task
    vectors of the others and of the weight are at 60 degrees to each other.
    """
    base, tuned = inputs.base, inputs.tuned
    if method == "model_stock":
        base, tuned = tuned[-1], [base, *tuned[:-1]]
    return base, tuned[: METHODS[method].tasks]


def _merge(inputs: Inputs, config: MergeConfig) -> Callable[[], Tensor]:
    base, tuned = operands(inputs, config.merge_method)
    return lambda: merge_tensors(base, tuned, config, out_dtype=torch.float32).weight


def _update(inputs: Inputs, weight: Any) -> list[Tensor]:
    return [weight.double() - inputs.base]


def _element_wise(name: str) -> Callable[[Inputs], Case]:
    method, parameters = ELEMENT_WISE[name]

    def make(inputs: Inputs) -> Case:
        config = MergeConfig(method, **parameters)

        base, tuned = operands(inputs, method)

        def exact() -> Tensor:
            return merge_tensors(base.double(), [tensor.double() for tensor in tuned], config).weight

        return op_case(
            inputs,
            ["elect_and_sum", "magnitude_select", "magnitude_ranks"],
            _merge(inputs, config),
            exact,
            base.nbytes * (1 + len(tuned)) + 4 * inputs.numel,
            limit=ROUNDING,
            values=lambda weight: [weight.double() - base],
        )

    return make


for _name in ELEMENT_WISE:
    benchmark(_name, "merges")(_element_wise(_name))

Update = Callable[[Tensor, Sequence[Tensor]], Tensor]


def _spectral(inputs: Inputs, method: str, parameters: dict[str, Any], by_svd: Update, ranks: Sequence[int]) -> Case:
    """Return a case of a spectral method; `by_svd` returns its update, in the dtype of its inputs."""
    device = inputs.device
    has_solver = "solver" in METHODS[method].parameters.model_fields
    on_tensor_cores = device.type == "cuda" and has_solver  # a CPU only simulates the products
    solvers = {"eigen": "cuda" if device.type == "cuda" else "cpu"}
    if on_tensor_cores:
        solvers["products"] = "triton"
    providers = []
    for solver, backend in solvers.items():
        chosen: dict[str, Any] = {"solver": solver} if has_solver else {}
        config = MergeConfig(method, **parameters, **chosen)
        providers.append(Provider(solver, on_backend(backend, _merge(inputs, config), device)))
    base, tuned = inputs.base, inputs.tuned

    def plain() -> Tensor:
        with all_on("torch", device.type):
            return base.float() + by_svd(base.float(), [tensor.float() for tensor in tuned])

    def exact() -> list[Tensor]:
        with all_on("torch", device.type):
            return [by_svd(*inputs.exact)]

    return Case(
        inputs,
        [*providers, Provider("float32 SVD", plain, "reference", FLOAT32_SVD)],
        exact,
        PROMISED,
        inputs.read_bytes + 4 * inputs.numel,
        lambda weight: _update(inputs, weight),
        tsv_merge_flops(inputs.shape, ranks),
        "matmul",
    )


def _task_matrices(base: Tensor, tuned: Sequence[Tensor]) -> list[Tensor]:
    return [tensor - base for tensor in tuned]


@benchmark("tsvm", "merges", "spectral")
def _(inputs: Inputs) -> Case:
    ranks = [min(inputs.shape) // inputs.tasks] * inputs.tasks
    return _spectral(
        inputs, "tsvm", {}, lambda base, tuned: published.tsv_merge(_task_matrices(base, tuned), ranks), ranks
    )


def _rtsvm(inputs: Inputs, density: float) -> Case:
    """R-TSVM with its other defaults: the reference steps, then SVDs."""

    def by_svd(base: Tensor, tuned: Sequence[Tensor]) -> Tensor:
        statistics = task_statistics(base, tuned)
        matrices = reweight_prune(base, tuned, statistics, density=density)
        return published.tsv_merge(matrices, ranks)

    sparsities = pruned_sparsity(task_statistics(inputs.base, inputs.tuned), density=density)
    rules = [choose_rank("sparsity", inputs.shape, inputs.tasks, sparsity=z) for z in sparsities]
    ranks = [rule for rule in rules if isinstance(rule, int)]
    return _spectral(inputs, "rtsvm", {"density": density}, by_svd, ranks)


@benchmark("rtsvm", "merges", "spectral")
def _(inputs: Inputs) -> Case:
    return _rtsvm(inputs, 1.0)


@benchmark("rtsvm: density 0.3", "merges", "spectral")
def _(inputs: Inputs) -> Case:
    return _rtsvm(inputs, 0.3)


@benchmark("iso_c", "merges", "spectral")
def _(inputs: Inputs) -> Case:
    return _spectral(
        inputs, "iso_c", {}, lambda base, tuned: published.iso_c(_task_matrices(base, tuned)), [min(inputs.shape)]
    )


@benchmark("iso_cts", "merges", "spectral")
def _(inputs: Inputs) -> Case:
    return _spectral(
        inputs, "iso_cts", {}, lambda base, tuned: published.iso_cts(_task_matrices(base, tuned)), [min(inputs.shape)]
    )


@benchmark("subspace_boosting", "merges", "spectral")
def _(inputs: Inputs) -> Case:
    def by_svd(base: Tensor, tuned: Sequence[Tensor]) -> Tensor:
        return published.subspace_boosting(_task_matrices(base, tuned))

    return _spectral(inputs, "subspace_boosting", {}, by_svd, [min(inputs.shape)])


@benchmark("star", "merges", "spectral")
def _(inputs: Inputs) -> Case:
    return _spectral(
        inputs, "star", {}, lambda base, tuned: published.star(_task_matrices(base, tuned)), [min(inputs.shape)]
    )


def _of_adapters(inputs: Inputs, method: str, by_svd: Callable[[Sequence[Tensor]], Tensor]) -> Case:
    base = torch.zeros(inputs.shape, device=inputs.device)
    config = MergeConfig(method)
    return lora_case(inputs, lambda adapters: merge_tensors(base, adapters, config).weight, by_svd)


@benchmark("knots: LoRA", "merges", "spectral")
def _(inputs: Inputs) -> Case:
    return _of_adapters(inputs, "knots", published.knots)


@benchmark("core_space: LoRA", "merges", "spectral")
def _(inputs: Inputs) -> Case:
    """With TSV-Merge of the cores, which divides the sum of the ranks among the tasks."""
    ranks = [lora_set(inputs)[0].left.shape[1]] * inputs.tasks
    return _of_adapters(inputs, "core_space", lambda matrices: published.tsv_merge(matrices, ranks))


@benchmark("combine_adapters: svd", "merges", "spectral")
def _(inputs: Inputs) -> Case:
    """A weighted sum of adapters, cut back to their rank; neither side multiplies the factors of the result."""
    from ..integrations.peft import combine_adapters

    weights, rank = ADAPTER_WEIGHTS[: inputs.tasks], lora_set(inputs)[0].left.shape[1]
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["layer"]}
    names = [f"base_model.model.layer.lora_{factor}.weight" for factor in "BA"]

    def call(adapters: Sequence[Factored]) -> Factored:
        states = [dict(zip(names, (adapter.left, adapter.right), strict=True)) for adapter in adapters]
        combined, _ = combine_adapters(states, [config] * len(states), weights, "svd", rank=rank)
        left, right = (combined[name] for name in names)
        return Factored(left, right)

    def by_svd(matrices: Sequence[Tensor]) -> Tensor:
        return published.truncated(torch.stack([w * x for w, x in zip(weights, matrices, strict=True)]).sum(0), rank)

    def values(result: Any) -> list[Tensor]:
        return [result.dense() if isinstance(result, Factored) else result]

    (m, n), total = inputs.shape, rank * inputs.tasks
    return replace(
        lora_case(inputs, call, by_svd),
        values=values,
        bytes=4 * (m + n) * (total + rank),
        flops=6.0 * (m + n) * total**2,
    )
