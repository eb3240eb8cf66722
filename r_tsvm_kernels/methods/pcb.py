"""PCB-Merging: average the task vectors, each element by how it competes within its task and with the other tasks.

With the task vectors ``D_t = W_t - W_0`` of one tensor, T of them, and ``norm(x) = (x - min x) / (max x - min x)``:

1. Clip: C_t has the signs of D_t and its magnitudes, clipped at their 0.01 % smallest and 0.01 % largest.
2. Intra-balancing: ``a_t = exp(T norm(|C_t|)^2)``, how much an element matters to its own task.
3. Inter-balancing: ``b_t = tanh(D_t sum_s(D_s))``, whether the tasks agree.
4. Drop and rescale: of ``a_t b_t`` the fraction `density` is kept; s_t is norm of what is kept, and 0 elsewhere::

       W = W_0 + alpha * sum_t(w_t s_t C_t) / sum_t(s_t)

Source: Du et al., "Parameter Competition Balancing for Model Merging", NeurIPS 2024, as the authors' code computes it.
The paper has a softmax in place of exp in step 2 and of tanh in step 3, sums the softmaxes of the products with the
single tasks, does not clip, and divides by sums of what is kept, not of its norm. Their code does this for all tensors
of a model as one vector; here each tensor is one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from ..ops import add_update
from ..ops._checks import accumulation_dtype
from .base import Cost, FiniteFloat, MethodParameters, PerModel, TensorJob, register
from .reports import MergeResult, TensorReport
from .sparsify import Share

# Share of the elements beyond which magnitudes are clipped, at either end.
CLIPPED = 1e-4


class PcbParameters(MethodParameters):
    """Parameters of `pcb`."""

    density: PerModel[Share] = Field(default=(0.1,), description="fraction of each task vector that is kept")
    alpha: FiniteFloat = Field(default=1.0, alias="lambda", description="scale of the merged task vector")


def pcb_cost(job: TensorJob, options: PcbParameters) -> Cost:
    """Return the cost of `pcb`: sums over the tasks, and the scores of one task at a time, in float64."""
    return Cost((88 + 2 * job.itemsize) * job.elements, 60.0 * job.tasks * job.elements)


@register(
    "pcb",
    pretty_name="PCB-Merging",
    paper_url="https://arxiv.org/abs/2410.02396",
    parameters=PcbParameters,
    rounds=True,
    ops=("add_update", "elect_and_sum"),
    aliases=("pcb_merging",),
    cost=pcb_cost,
)
def pcb(
    base: Tensor, tuned: Sequence[Tensor], options: PcbParameters, out_dtype: torch.dtype | None = None
) -> MergeResult:
    """Merge by PCB-Merging: the steps at the top of this module.

    Examples:
        >>> tuned = [torch.tensor([4.0, 3.0, 1.0, 0.0]), torch.tensor([2.0, 2.0, -0.5, 0.0])]
        >>> pcb(torch.zeros(4), tuned, PcbParameters(weight=[1.0] * 2, density=[0.5] * 2)).weight
        tensor([2.5000, 0.0000, 0.0000, 0.0000])
    """
    start = base.double()
    total = torch.zeros_like(start)
    for tensor in tuned:
        total += tensor.double() - start
    merged, divisor = torch.zeros_like(start), torch.zeros_like(start)
    for tensor, weight, density in zip(tuned, options.weight, options.density, strict=True):
        delta = tensor.double() - start
        clipped, scale = _balanced(delta, total, len(tuned), density)
        divisor += scale
        merged.addcmul_(scale, clipped, value=weight)
    del start, total, delta, clipped, scale
    merged.div_(divisor.masked_fill_(divisor == 0, 1))
    merged = merged.to(accumulation_dtype(base, *tuned))
    return MergeResult(
        add_update(base, merged, options.alpha, out_dtype=out_dtype), TensorReport(weights=list(options.weight))
    )


def _balanced(delta: Tensor, total: Tensor, tasks: int, density: float) -> tuple[Tensor, Tensor]:
    """Return C_t and s_t of one task."""
    number = delta.numel()
    size = delta.abs()
    size.clamp_(_kth(size, int(number * CLIPPED)), _kth(size, int(number * (1 - CLIPPED) - 1)))
    score = _norm(size).square_().sub_(1).mul_(tasks).exp_()  # exp(-T) more, which norm divides out
    clipped = size.mul_(delta.sign())
    score *= (delta * total).tanh_()
    if density == 0:
        return clipped, torch.zeros_like(score)
    least = _kth(score, min(int(number * (1 - density)), number - 1))
    if least == score.amax():  # nothing to compare: what is kept counts alike, unless the tasks disagree
        return clipped, ((score >= least) & (score > 0)).double()
    return clipped, _norm(score.clamp_(min=least))


def _kth(values: Tensor, index: int) -> Tensor:
    """Return the value at this index of the sorted values."""
    return values.flatten().kthvalue(max(index, 0) + 1).values


def _norm(values: Tensor) -> Tensor:
    """Return ``(x - min x) / (max x - min x)``; zeros if all values are equal."""
    least, largest = values.aminmax()
    return (values - least).div_(torch.where(largest > least, largest - least, 1))
