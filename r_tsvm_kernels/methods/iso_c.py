"""Iso-C: the sum of the task matrices with equal singular values.

With the SVD ``sum_t(w_t D_t) = U diag(s) V^T`` of the task matrices ``D_t = W_t - W_0``::

    W = W_0 + alpha * mean(s) * U V^T

Source: Marczak et al., "No Task Left Behind", ICML 2025.
``U V^T`` is the polar factor, which needs no SVD, and ``sum(s)`` is the inner product of it with the sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from ..linalg import BACKWARD_ERROR, Factored, Mode, leading_triplets, nonzero_support, polar, weighted_sum
from ..linalg.decompositions import frobenius_norm, svd
from ..linalg.inverse_root import RANK_TOLERANCE
from ..linalg.rounding import EPS
from ..ops import add_update
from ..ops._checks import accumulation_dtype
from .base import SPECTRAL_OPS, Cost, FiniteFloat, MethodParameters, TensorJob, always, register
from .reports import MergeResult, TensorReport, timed

# Singular values that count as zero are left out of the mean if their sum is at most this share of the tolerance.
LOST = 0.01


class IsoCParameters(MethodParameters):
    """Parameters of `iso_c`."""

    alpha: FiniteFloat = Field(default=1.0, alias="scaling_factor", description="scale of the merged task vector")
    mode: Mode = Field(default="exact", description="exact (1e-4 of float64) or fast (1e-2)")
    exclude_keys: list[str] = Field(
        default=[], description="names (or patterns with *) of matrices that get the mean task vector instead"
    )


def iso_c_cost(job: TensorJob, options: IsoCParameters) -> Cost:
    """Return the cost of `iso_c`: the sum in float64, and its polar factor."""
    short, elements = min(job.shape), job.elements
    flops = (2.0 * job.tasks + 4.0 * short) * elements + 9.0 * short**3
    return Cost(8 * (8 * elements + 14 * short**2), flops)


@register(
    "iso_c",
    pretty_name="Iso-C",
    paper_url="https://arxiv.org/abs/2502.04959",
    parameters=IsoCParameters,
    rounds=True,
    ops=SPECTRAL_OPS,
    matrices_only=True,
    isotropic=always,
    factored=always,
    cost=iso_c_cost,
)
def iso_c(
    base: Tensor, tuned: Sequence[Any], options: IsoCParameters, out_dtype: torch.dtype | None = None
) -> MergeResult:
    """Merge by Iso-C: the formula at the top of this module.

    If the sum has no full rank, ``U V^T`` is a partial isometry: rows and columns that no task touched stay the base's.

    Examples:
        >>> base = torch.zeros(2, 2)
        >>> tuned = [torch.tensor([[3.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, 1.0]])]
        >>> iso_c(base, tuned, IsoCParameters(weight=[1.0] * 2)).weight
        tensor([[2., 0.],
                [0., 2.]])
    """
    if isinstance(tuned[0], Factored):
        return _merge_factors(base, tuned, options, out_dtype)
    total, rows, columns, rounding = sum_of_tasks(base, tuned, options.weight)
    core = total[rows][:, columns]
    report = TensorReport(weights=list(options.weight))
    with timed(report.stages, "spectral"):
        factor = polar(core, mode=options.mode)
    nuclear = float((core * factor.matrix).sum())
    lost = 0.0
    if factor.rank < min(core.shape):
        left_out, lost = _sum_left_out(core, factor.matrix, LOST * factor.certificate.tolerance * nuclear)
        nuclear += left_out
    total[rows.unsqueeze(1), columns] = factor.matrix.mul_(nuclear / min(base.shape))
    dtype = accumulation_dtype(base, *tuned)
    certificate = factor.certificate.rounded(dtype)
    if nuclear > 0:
        # Rounding of a sum in which tasks cancel, over the smallest singular value; the factor's norm is sqrt(rank).
        turned = 2 * rounding * factor.condition * min(core.shape) / (nuclear * factor.rank**0.5)
        certificate = replace(certificate, error=certificate.error + lost / nuclear + turned)
    report.certificate = certificate
    report.certificate.require()
    return MergeResult(add_update(base, total.to(dtype), options.alpha, out_dtype=out_dtype), report)


def _sum_left_out(matrix: Tensor, factor: Tensor, negligible: float) -> tuple[float, float]:
    """Return the sum of the singular values that the polar factor counts as zero, and a bound of its error.

    A negligible sum is not computed.
    """
    wide = matrix.shape[0] < matrix.shape[1]
    A, P = (matrix.mT, factor.mT) if wide else (matrix, factor)
    rest = A - P @ (P.mT @ A)
    bound = frobenius_norm(rest) * min(matrix.shape) ** 0.5
    if bound <= negligible:
        return 0.0, bound
    values = svd(torch.linalg.qr(rest, mode="r").R)[1]
    return float(values.sum()), len(values) * BACKWARD_ERROR * frobenius_norm(A)


def _merge_factors(
    base: Tensor, updates: Sequence[Factored], options: IsoCParameters, out_dtype: torch.dtype | None
) -> MergeResult:
    """Take the polar factor from the singular vectors of the sum, which has low rank and is not formed."""
    total = weighted_sum(updates, options.weight)
    found = leading_triplets(total, lambda values: int((values > RANK_TOLERANCE * values[0]).sum()))
    dtype = accumulation_dtype(base, *(update.left for update in updates))
    mean = float(found.cut.values.sum()) / min(base.shape)
    update = (found.U * mean).to(dtype) @ found.Vh.to(dtype)
    certificate = found.certificate.rounded(dtype)
    report = TensorReport(weights=list(options.weight), certificate=certificate)
    return MergeResult(add_update(base, update, options.alpha, out_dtype=out_dtype), report)


def sum_of_tasks(
    base: Tensor, tuned: Sequence[Tensor], weights: Sequence[float]
) -> tuple[Tensor, Tensor, Tensor, float]:
    """Return ``sum(w_t D_t)`` in float64, the rows and columns that some task changed, and the norm of rounding errors.

    Only these rows and columns may change.
    """
    start, changed = base.double(), tuned[0] != base
    total, added = torch.zeros_like(start), 0.0
    for weight, tensor in zip(weights, tuned, strict=True):
        changed |= tensor != base
        delta = tensor.double() - start
        total.add_(delta, alpha=weight)
        added += abs(weight) * frobenius_norm(delta)
    return total, *nonzero_support([changed]), 2 * EPS * added
