"""NearSwap: moves each element of the base towards the model, fully where the two are near.

With ``D = W_1 - W_0``, element by element::

    W = W_0 + min(1, t / max(abs(D), 1e-6)) D

So no element moves by more than `t`.

Source: alchemonaut, https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001, 2024.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field
from torch import Tensor

from .base import FiniteFloat, Unweighted, register
from .piecewise import piecewise_cost, plus_update
from .reports import MergeResult, TensorReport

# Differences below it move by the fraction t / NEAR of themselves.
NEAR = 1e-6


class NearswapParameters(Unweighted):
    """Parameters of `nearswap`."""

    t: FiniteFloat = Field(default=1e-4, ge=0, description="differences up to t are taken over, larger ones cut to t")


@register(
    "nearswap",
    pretty_name="NearSwap",
    paper_url="https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001",
    parameters=NearswapParameters,
    ops=(),
    row_wise=True,
    tasks=1,
    cost=piecewise_cost,
)
def nearswap(base: Tensor, tuned: Sequence[Tensor], options: NearswapParameters) -> MergeResult:
    """Merge by NearSwap: the formula at the top of this module.

    Examples:
        >>> nearswap(torch.zeros(3), [torch.tensor([0.05, -2.0, 0.3])], NearswapParameters(t=0.1)).weight
        tensor([ 0.0500, -0.1000,  0.1000])
    """

    def update(deltas: list[Tensor]) -> Tensor:
        (delta,) = deltas
        share = delta.abs().clamp_(min=NEAR).reciprocal_().mul_(options.t).clamp_(max=1)
        return delta.mul_(share)

    return MergeResult(plus_update(base, tuned, update), TensorReport(weights=[1.0]))
