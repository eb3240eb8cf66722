"""NuSLERP: from one model to another along the great circle, around the base or around zero.

With the angle a between X_1 and X_2, the task vectors ``W_t - W_0``, or the models where there is no base::

    W = W_0 + (sin((1 - u) a) X_1 + sin(u a) X_2) / sin(a),   u = w_2 / (w_1 + w_2)

Tensors are vectors as a whole, or row by row, or column by column.

Source: Goddard, mergekit, https://github.com/arcee-ai/mergekit, 2024; Shoemake, SIGGRAPH 1985.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from ..ops import elect_and_sum
from ..ops._checks import accumulation_dtype, tile_elements
from .base import Cost, MethodParameters, TensorJob, register
from .gram import checked, cosines, geometric_cost, gram_matrix
from .reports import MergeResult, TensorReport

# Weights of a smaller sum count as equal.
SMALLEST_SUM = 1e-6
# Of parallel and opposite vectors: the squared sine up to which they have no great circle.
PARALLEL = 1e-16


class NuslerpParameters(MethodParameters):
    """Parameters of `nuslerp`."""

    nuslerp_flatten: bool = Field(default=True, description="a tensor is one vector; otherwise each row is one")
    nuslerp_row_wise: bool = Field(default=False, description="without flatten: columns are vectors, not rows")
    relative: bool = Field(
        default=True, description="interpolate differences from the base; false (always without a base): the models"
    )


def nuslerp_cost(job: TensorJob, options: NuslerpParameters) -> Cost:
    """Return the cost of `nuslerp`; of rows or columns in float64."""
    if options.nuslerp_flatten or len(job.shape) < 2:
        return geometric_cost(job, options)
    piece = min(job.elements, max(job.shape[-1], job.shape[0], tile_elements(job.device_type)))
    return Cost(3 * job.itemsize * job.elements + 8 * 8 * piece, 20.0 * job.elements)


@register(
    "nuslerp",
    pretty_name="NuSLERP",
    paper_url="https://github.com/arcee-ai/mergekit",
    parameters=NuslerpParameters,
    ops=("elect_and_sum", "task_gram"),
    needs_base=False,
    optional_base=True,
    tasks=2,
    cost=nuslerp_cost,
)
def nuslerp(base: Tensor, tuned: Sequence[Tensor], options: NuslerpParameters) -> MergeResult:
    """Merge by NuSLERP: the formula at the top of this module. Parallel vectors are interpolated on a line.

    Examples:
        >>> tuned = [torch.tensor([3.0, 0.0]), torch.tensor([0.0, 3.0])]
        >>> nuslerp(torch.zeros(2), tuned, NuslerpParameters(weight=[1.0, 1.0])).weight
        tensor([2.1213, 2.1213])
    """
    first, second = options.weight
    scale = max(abs(first), abs(second), 1.0)  # a sum of large weights may overflow
    total = first / scale + second / scale
    share = 0.5 if abs(total) * scale < SMALLEST_SUM else second / scale / total
    if options.nuslerp_flatten or base.ndim < 2:
        gram = gram_matrix(tuned, base if options.relative else None)
        factors = great_circle(cosines(gram)[0, 1], share).tolist()
        origin = base if options.relative else base.new_zeros(base.shape[-1:]).expand_as(base)
        return MergeResult(elect_and_sum(origin, tuned, factors), TensorReport(weights=factors))
    dtype = accumulation_dtype(base, *tuned)
    merged = torch.empty(base.shape, dtype=dtype, device=base.device)
    tensors = (merged, base, *tuned)
    if options.nuslerp_row_wise:
        tensors = tuple(tensor.transpose(0, -1) for tensor in tensors)
    means = _by_rows(*tensors, share=share, relative=options.relative)
    return MergeResult(merged, TensorReport(weights=means))


def _by_rows(merged: Tensor, base: Tensor, *tuned: Tensor, share: float, relative: bool) -> list[float]:
    """Interpolate the rows along the last dimension into `merged`; return the mean factors."""
    height = max(1, tile_elements(base.device.type) * len(base) // base.numel())
    means = torch.zeros(2, dtype=torch.float64, device="cpu")
    for first in range(0, len(base), height):
        place = slice(first, first + height)
        origin = base[place].double()
        vectors = torch.stack([model[place].double() - (origin if relative else 0) for model in tuned], dim=-2)
        factors = great_circle(cosines(checked(vectors @ vectors.mT))[..., 0, 1], share)
        update = (factors.movedim(0, -1).unsqueeze(-2) @ vectors).squeeze(-2)
        merged[place] = update.add_(origin) if relative else update
        means += factors.flatten(1).mean(1).cpu() * len(origin) / len(base)
    found: list[float] = means.tolist()
    return found


def great_circle(cosine: Tensor, share: float) -> Tensor:
    """Return the factors of two vectors, (2, ...), from the cosine of their angle, (...) float64."""
    angle = cosine.acos()
    circle = torch.stack([torch.sin((1 - share) * angle), torch.sin(share * angle)]) / torch.sin(angle)
    line = torch.tensor([1 - share, share], dtype=cosine.dtype, device=cosine.device)
    return torch.where(1 - cosine.square() > PARALLEL, circle, line.reshape(2, *[1] * cosine.ndim))
