"""Benchmarks of the element-wise ops, which are bound by memory: bytes count."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..ops import MagnitudeSelection, RankedSparsifier, Sparsifier
from ..ops.random_mask.reference import random_words
from . import torch_best
from .case import Case, Inputs, Provider, all_on, by_backend
from .registry import benchmark

SIGMA, EPS, DENSITY, SEED = 3.0, 0.1, 0.5, 1
# Float32 results of float32 arithmetic on exact differences: a few roundings. One wrong element of millions is more.
ROUNDING = 1e-6


def op_case(
    inputs: Inputs,
    used: Sequence[str],
    call: Callable[[], Any],
    truth: Callable[[], Any],
    moved: int,
    best: Callable[[], Any] | None = None,
    compiled: bool = False,
    limit: float = ROUNDING,
    **more: Any,
) -> Case:
    """Return the case of an op: every backend, eager torch, the best of torch; the truth by the reference in float64.

    Args:
        inputs: the input.
        used: names of the ops in the dispatch table.
        call: the public function on the input.
        truth: the same in float64, run on the references; or the true values.
        moved: bytes that must move.
        best: the best of torch.
        compiled: whether torch.compile runs the best of torch, too.
        limit: largest relative error.
        more: other fields of `Case`.
    """
    device = inputs.device
    providers, unavailable = by_backend(used, call, device)
    if best is not None:
        providers.append(Provider("torch, best", best, "torch"))
        if compiled:
            providers.append(Provider("torch.compile", _compiled(best), "torch", compiles=True))
    values = more.setdefault("values", _all_leaves)

    def exact() -> Sequence[Tensor]:
        with all_on("torch", device.type):
            found: Sequence[Tensor] = values(truth())
            return found

    return Case(inputs, providers, exact, limit, moved, unavailable=unavailable, **more)


def _compiled(call: Callable[[], Any]) -> Callable[[], Any]:
    """Return a call compiled by torch.compile, at the first use: its import takes seconds."""

    @cache
    def ready() -> Callable[[], Any]:
        torch.compiler.reset()  # after a handful of other inputs it would fall back to eager
        return torch.compile(call)

    return lambda: ready()()


def _all_leaves(result: Any) -> list[Tensor]:
    from .measure import leaves

    return leaves(result)


def _statistics(result: Any) -> list[Tensor]:
    if isinstance(result, list):
        found: list[Tensor] = result
        return found
    return [result.mean, result.theta, result.outlier_mass, result.small]


@benchmark("task_statistics", "ops")
def _(inputs: Inputs) -> Case:
    base, tuned = inputs.base, inputs.tuned
    return op_case(
        inputs,
        ["task_statistics"],
        lambda: ops.task_statistics(base, tuned, sigma=SIGMA, eps=EPS),
        lambda: ops.task_statistics(*inputs.exact, sigma=SIGMA, eps=EPS),
        inputs.read_bytes,
        best=lambda: torch_best.statistics(base, tuned, SIGMA, EPS),
        values=_statistics,
    )


def _selection(result: Any) -> list[Tensor]:
    """Threshold and ties; a number of ties is one however it is stored."""
    return [tensor for part in _listed(result) for tensor in (part.threshold.double(), part.ties.long())]


def _listed(result: Any) -> Sequence[MagnitudeSelection]:
    return [result] if isinstance(result, MagnitudeSelection) else result


@benchmark("magnitude_select", "ops")
def _(inputs: Inputs) -> Case:
    x, keep = inputs.tuned[0], ops.kept_count(0.2, inputs.numel)
    return op_case(
        inputs,
        ["magnitude_select"],
        lambda: ops.magnitude_select(x, keep),
        lambda: ops.magnitude_select(x.double(), keep),
        x.nbytes,
        best=lambda: torch_best.select(x, keep),
        values=_selection,
    )


@benchmark("magnitude_select: of a task vector", "ops")
def _(inputs: Inputs) -> Case:
    x, base, keep = inputs.tuned[0], inputs.base, ops.kept_count(0.2, inputs.numel)
    return op_case(
        inputs,
        ["magnitude_select"],
        lambda: ops.magnitude_select(x, keep, base=base),
        lambda: ops.magnitude_select(x.double(), keep, base=base.double()),
        2 * x.nbytes,
        best=lambda: torch_best.select(x.float() - base.float(), keep),
        values=_selection,
    )


@benchmark("magnitude_ranks", "ops")
def _(inputs: Inputs) -> Case:
    x = inputs.tuned[0]
    return op_case(
        inputs,
        ["magnitude_ranks"],
        lambda: ops.magnitude_ranks(x),
        lambda: ops.magnitude_ranks(x.double()),
        x.nbytes + 4 * inputs.numel,
        best=lambda: torch_best.ranks(x),
    )


@benchmark("ranked_mask", "ops")
def _(inputs: Inputs) -> Case:
    x, base, chances = inputs.tuned[0], inputs.base, ops.della_probabilities(inputs.shape[1], DENSITY, 0.1)

    def exact() -> Tensor:
        chosen = chances.to(x.device)[ops.magnitude_ranks(x.double() - base.double()).long()]
        return random_words(inputs.numel, SEED, 0, inputs.device).view(inputs.shape).double() < chosen * 2.0**32

    return op_case(
        inputs,
        ["ranked_mask"],
        lambda: ops.ranked_mask(x, chances, seed=SEED, base=base),
        exact,
        2 * x.nbytes + inputs.numel,
    )


@benchmark("random_mask", "ops")
def _(inputs: Inputs) -> Case:
    def exact() -> Tensor:
        words = random_words(inputs.numel, SEED, 0, inputs.device)
        return (words.double() < DENSITY * 2.0**32).view(inputs.shape)

    return op_case(
        inputs,
        ["random_mask"],
        lambda: ops.random_mask(inputs.shape, DENSITY, seed=SEED, device=inputs.device),
        exact,
        inputs.numel,
    )


@benchmark("task_gram", "ops")
def _(inputs: Inputs) -> Case:
    base, tuned = inputs.base, inputs.tuned
    return op_case(
        inputs,
        ["task_gram"],
        lambda: ops.task_gram(tuned, base=base),
        lambda: _products(*inputs.exact),
        inputs.read_bytes,
        best=lambda: torch_best.gram(base, tuned),
    )


def _products(base: Tensor, tuned: Sequence[Tensor]) -> Tensor:
    deltas = [tensor - base for tensor in tuned]
    return torch.stack([torch.stack([(s * t).sum() for t in deltas]) for s in deltas])


@benchmark("task_spread", "ops")
def _(inputs: Inputs) -> Case:
    base, tuned = inputs.base, inputs.tuned
    return op_case(
        inputs,
        ["task_spread"],
        lambda: ops.task_spread(base, tuned),
        lambda: inputs.tasks * torch.stack([x - inputs.exact[0] for x in inputs.exact[1]]).var(0, unbiased=False),
        inputs.read_bytes + 8 * inputs.numel,
        best=lambda: torch_best.spread(base, tuned),
    )


@benchmark("spread_select", "ops")
def _(inputs: Inputs) -> Case:
    base, tuned = inputs.base, inputs.tuned

    def half(differing: int) -> int:
        return differing // 2

    return op_case(
        inputs,
        ["spread_select"],
        lambda: ops.spread_select(base, tuned, half).threshold,
        lambda: ops.spread_select(*inputs.exact, half).threshold,
        inputs.read_bytes,
        best=lambda: torch_best.spread(base, tuned).flatten().kthvalue(inputs.numel - inputs.numel // 2 + 1).values,
    )


@benchmark("spread_mask", "ops")
def _(inputs: Inputs) -> Case:
    base, tuned = inputs.base, inputs.tuned
    selection = ops.spread_select(base, tuned, lambda differing: differing // 2)
    return op_case(
        inputs,
        ["spread_mask"],
        lambda: ops.spread_mask(base, tuned, selection),
        lambda: ops.spread_mask(*inputs.exact, selection),
        inputs.read_bytes + inputs.numel,
        best=lambda: torch_best.spread(base, tuned) >= selection.threshold,
    )


@benchmark("reweight_prune", "ops")
def _(inputs: Inputs) -> Case:
    base, tuned = inputs.base, inputs.tuned
    statistics = ops.task_statistics(base, tuned, sigma=SIGMA, eps=EPS)
    keep = ops.kept_count(DENSITY, inputs.numel)
    return op_case(
        inputs,
        ["reweight_prune"],
        lambda: ops.reweight_prune(base, tuned, statistics, density=DENSITY),
        lambda: ops.reweight_prune(*inputs.exact, statistics, density=DENSITY),
        inputs.read_bytes + 4 * inputs.numel * inputs.tasks,
        best=lambda: torch_best.prune(base, tuned, statistics.theta, keep),
    )


@benchmark("add_update", "ops")
def _(inputs: Inputs) -> Case:
    base, update, alpha = inputs.base, inputs.deltas[0], 0.7
    return op_case(
        inputs,
        ["add_update"],
        lambda: ops.add_update(base, update, alpha),
        lambda: ops.add_update(base.double(), update.double(), alpha),
        base.nbytes + 8 * inputs.numel,
        best=lambda: torch_best.add(base, update, alpha),
        compiled=True,
    )


@benchmark("add_update: stored", "ops")
def _(inputs: Inputs) -> Case:
    base, update, alpha = inputs.base, inputs.deltas[0], 0.7
    return op_case(
        inputs,
        ["add_update"],
        lambda: ops.add_update(base, update, alpha, out_dtype=base.dtype),
        lambda: ops.add_update(base.double(), update.double(), alpha),
        2 * base.nbytes + 4 * inputs.numel,
        best=lambda: torch_best.add(base, update, alpha).to(base.dtype),
        compiled=True,
        limit=max(ROUNDING, torch.finfo(base.dtype).eps),
    )


def _elect_and_sum(
    inputs: Inputs,
    options: dict[str, Any],
    best: Callable[..., Tensor] | None = None,
    used: Sequence[str] = ("elect_and_sum",),
) -> Case:
    """Return a case of `elect_and_sum`; what it keeps is found beforehand."""
    base, tuned, weights = inputs.base, inputs.tuned, [1.0] * inputs.tasks
    return op_case(
        inputs,
        used,
        lambda: ops.elect_and_sum(base, tuned, weights, **options),
        lambda: ops.elect_and_sum(*inputs.exact, weights, **options),
        inputs.read_bytes + 4 * inputs.numel,
        best=None if best is None else lambda: best(base, *tuned),
        compiled=True,
    )


@benchmark("elect_and_sum: sum", "ops")
def _(inputs: Inputs) -> Case:
    return _elect_and_sum(inputs, {}, torch_best.sum_tasks)


@benchmark("elect_and_sum: election", "ops")
def _(inputs: Inputs) -> Case:
    return _elect_and_sum(inputs, {"elect": "sum", "normalize": True}, torch_best.ties)


@benchmark("elect_and_sum: SCE", "ops")
def _(inputs: Inputs) -> Case:
    spread = ops.task_spread(inputs.base, inputs.tuned)
    chosen = ops.magnitude_select(spread, inputs.numel // 2).mask(spread)
    return _elect_and_sum(
        inputs, {"elect": "unweighted", "normalize": True, "sparsifiers": [Sparsifier(mask=chosen)] * inputs.tasks}
    )


@benchmark("elect_and_sum: TIES", "ops")
def _(inputs: Inputs) -> Case:
    keep = ops.kept_count(0.2, inputs.numel)
    rules = [Sparsifier(largest=ops.magnitude_select(tensor, keep, base=inputs.base)) for tensor in inputs.tuned]
    return _elect_and_sum(inputs, {"elect": "sum", "normalize": True, "sparsifiers": rules})


@benchmark("elect_and_sum: DARE", "ops")
def _(inputs: Inputs) -> Case:
    rules = [
        Sparsifier(keep_probability=DENSITY, rescale=1 / DENSITY, seed=SEED, substream=t) for t in range(inputs.tasks)
    ]
    return _elect_and_sum(inputs, {"sparsifiers": rules})


@benchmark("elect_and_sum: DELLA", "ops")
def _(inputs: Inputs) -> Case:
    chances = ops.della_probabilities(inputs.shape[1], DENSITY, 0.1)
    ranks = [ops.magnitude_ranks(tensor, base=inputs.base) for tensor in inputs.tuned]
    rules = [Sparsifier(seed=SEED, substream=t, ranked=RankedSparsifier(r, chances)) for t, r in enumerate(ranks)]
    return _elect_and_sum(inputs, {"sparsifiers": rules})
