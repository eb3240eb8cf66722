"""RAM: the mean of those task vectors that change an element.

With ``D_t = W_t - W_0`` and the tasks ``A = {t: abs(D_t) > epsilon}`` that change an element::

    W = W_0 + sum_{t in A} D_t / max(1, |A|)                                              (ram)
    W = W_0 + sum_{t in A} D_t * (l_t if |A| = 1 else 1 / |A|)                            (ramplus_tl)

    l_t = 1 + r * min(alpha, shared_t / unique_t)

where `shared_t` and `unique_t` count the elements of the tensor that task t changes together with others, and alone.

Source: "Reinforced Agent Merging", arXiv 2601.13572; `ramplus_tl` takes the ratio per tensor, as mergekit does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from .base import FiniteFloat, Unweighted, register
from .piecewise import pieces, piecewise_cost, plus_update
from .reports import MergeResult, TensorReport


class RamParameters(Unweighted):
    """Parameters of `ram`."""

    epsilon: FiniteFloat = Field(default=1e-5, ge=0, description="a task changes elements that differ by more")


class RamPlusParameters(RamParameters):
    """Parameters of `ramplus_tl`."""

    r: FiniteFloat = Field(default=0.1, description="gain of elements that one task changes alone")
    ratio_limit: FiniteFloat = Field(
        default=0.2, ge=0, alias="alpha", description="largest ratio of shared to unique elements that counts"
    )


@register(
    "ram",
    pretty_name="RAM",
    paper_url="https://arxiv.org/abs/2601.13572",
    parameters=RamParameters,
    ops=(),
    row_wise=True,
    cost=piecewise_cost,
)
def ram(base: Tensor, tuned: Sequence[Tensor], options: RamParameters) -> MergeResult:
    """Merge by RAM: the first formula at the top of this module.

    Examples:
        >>> tuned = [torch.tensor([4.0, 1.0, 0.0]), torch.tensor([2.0, 0.0, 0.0])]
        >>> ram(torch.zeros(3), tuned, RamParameters()).weight
        tensor([3., 1., 0.])
    """
    return _merged(base, tuned, options.epsilon, [1.0] * len(tuned))


@register(
    "ramplus_tl",
    pretty_name="RAM+ (tensor-local)",
    paper_url="https://arxiv.org/abs/2601.13572",
    parameters=RamPlusParameters,
    ops=(),
    cost=piecewise_cost,
)
def ramplus_tl(base: Tensor, tuned: Sequence[Tensor], options: RamPlusParameters) -> MergeResult:
    """Merge by RAM+: the second formula at the top of this module.

    Examples:
        >>> tuned = [torch.tensor([4.0, 1.0, 0.0]), torch.tensor([2.0, 0.0, 0.0])]
        >>> ramplus_tl(torch.zeros(3), tuned, RamPlusParameters(r=0.5, alpha=1.0)).weight  # shared 1, unique 1
        tensor([3.0000, 1.5000, 0.0000])
    """
    shared = torch.zeros(len(tuned), dtype=torch.int64, device=base.device)
    unique = torch.zeros_like(shared)
    for _, _, deltas in pieces(base, tuned):
        active = torch.stack([delta.abs() > options.epsilon for delta in deltas])
        alone = active.sum(0) == 1
        unique += (active & alone).sum(1)
        shared += (active & ~alone).sum(1)
    ratios = [
        s / u if u else float(s > 0) * options.ratio_limit
        for s, u in zip(shared.tolist(), unique.tolist(), strict=True)
    ]
    gains = [1 + options.r * min(options.ratio_limit, ratio) for ratio in ratios]
    return _merged(base, tuned, options.epsilon, gains)


def _merged(base: Tensor, tuned: Sequence[Tensor], epsilon: float, gains: Sequence[float]) -> MergeResult:
    """Return the mean of the task vectors that change an element, of a single one times its gain."""

    def update(deltas: list[Tensor]) -> Tensor:
        active = [delta.abs() > epsilon for delta in deltas]
        count = torch.stack(active).sum(0)
        total = torch.zeros_like(deltas[0])
        for delta, own, gain in zip(deltas, active, gains, strict=True):
            share = count.clamp(min=1).to(delta.dtype).reciprocal_().masked_fill_(count == 1, gain)
            total += delta.mul_(share).masked_fill_(~own, 0)
        return total

    return MergeResult(plus_update(base, tuned, update), TensorReport(weights=list(gains)))
