"""Subspace Boosting: the sum of the task matrices with its small singular values raised.

With the SVD ``sum_t(w_t D_t) = U diag(s) V^T`` of the task matrices ``D_t = W_t - W_0``, and the first index k at which
the sum of the leading values ``s_0 + .. + s_k`` reaches the share `boost_beta` of the sum of all::

    W = W_0 + alpha * U diag(max(s, s_k)) V^T

Source: Skorobogat et al., "Subspace-Boosted Model Merging", arXiv 2506.16506; the share is that of the values, not of
their squares, as in the authors' code. It also boosts the sums of TIES and of Consensus TA.
With the polar factor P of the sum, the update is ``s_k P + U diag(max(s - s_k, 0)) V^T``: beside P, only the leading
triplets are needed. Values up to 1e-6 of the largest count as zero, and have no directions to raise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from ..linalg import BACKWARD_ERROR, Certificate, Mode, PolarFactor, Subspaces, leading_subspaces
from ..linalg.decompositions import frobenius_norm, svd
from ..linalg.inverse_root import RANK_TOLERANCE
from ..linalg.leading_right_vectors import EXACT
from ..linalg.polar_factor import polar_and_subspaces
from ..ops import add_update
from ..ops._checks import accumulation_dtype
from .base import SPECTRAL_OPS, Cost, FiniteFloat, MethodParameters, TensorJob, always, register
from .iso_c import sum_of_tasks
from .reports import MergeResult, TensorReport, timed


class SubspaceBoostingParameters(MethodParameters):
    """Parameters of `subspace_boosting`."""

    boost_beta: float = Field(
        default=0.01, ge=0, le=1, description="share of the nuclear norm whose last value is the least; 1 raises none"
    )
    alpha: FiniteFloat = Field(default=1.0, alias="scaling_factor", description="scale of the merged task vector")
    mode: Mode = Field(default="exact", description="exact (1e-4 of float64) or fast (1e-2)")
    exclude_keys: list[str] = Field(
        default=[], description="names (or patterns with *) of matrices that get the mean task vector instead"
    )


def subspace_boosting_cost(job: TensorJob, options: SubspaceBoostingParameters) -> Cost:
    """Return the cost of `subspace_boosting`: the sum in float64, its polar factor and its leading subspaces."""
    short, elements = min(job.shape), job.elements
    flops = (2.0 * job.tasks + 8.0 * short) * elements + 18.0 * short**3
    return Cost(8 * (11 * elements + 16 * short**2), flops)


@register(
    "subspace_boosting",
    pretty_name="Subspace Boosting",
    paper_url="https://arxiv.org/abs/2506.16506",
    parameters=SubspaceBoostingParameters,
    rounds=True,
    ops=SPECTRAL_OPS,
    matrices_only=True,
    isotropic=always,
    cost=subspace_boosting_cost,
)
def subspace_boosting(
    base: Tensor, tuned: Sequence[Tensor], options: SubspaceBoostingParameters, out_dtype: torch.dtype | None = None
) -> MergeResult:
    """Merge by Subspace Boosting: the formula at the top of this module.

    Examples:
        >>> base, tuned = torch.zeros(3, 3), [torch.diag(torch.tensor([5.0, 3.0, 1.0]))]
        >>> subspace_boosting(base, tuned, SubspaceBoostingParameters(weight=[1.0], boost_beta=0.7)).weight.diagonal()
        tensor([5., 3., 3.])
    """
    total, rows, columns, rounding = sum_of_tasks(base, tuned, options.weight)
    core = total[rows][:, columns]
    report = TensorReport(weights=list(options.weight))
    dtype = accumulation_dtype(base, *tuned)
    with timed(report.stages, "spectral"):
        factor, lead = polar_and_subspaces(core, _below(options.boost_beta), options.mode)
        boosted, certificate = _boosted(core, factor, lead, options.boost_beta, rounding)
        if not certificate.rounded(dtype).met:
            lead = leading_subspaces(core, _below(options.boost_beta), mode=options.mode, routes=EXACT)
            boosted, certificate = _boosted(core, factor, lead, options.boost_beta, rounding, exact=True)
    report.certificate = certificate.rounded(dtype)
    report.certificate.require()
    total[rows.unsqueeze(1), columns] = boosted
    return MergeResult(add_update(base, total.to(dtype), options.alpha, out_dtype=out_dtype), report)


class _Index(NamedTuple):
    number: int
    level: float


def _least(values: Tensor, share: float) -> _Index:
    """Return the index of the least singular value of the result, and that value."""
    sums = values.cumsum(0)
    index = min(int((sums < share * sums[-1]).sum()), len(values) - 1)
    return _Index(index, float(values[index]))


def _below(share: float) -> Callable[[Tensor], int]:
    """Return the rank rule for the triplets above the least value."""
    return lambda values: _least(values, share).number


def _boosted(
    core: Tensor, factor: PolarFactor, lead: Subspaces, share: float, rounding: float, *, exact: bool = False
) -> tuple[Tensor, Certificate]:
    """Return ``U diag(max(s, s_k)) V^T`` of the touched part of the sum, and its certificate.

    Raising the values is ``s_k P`` and a soft threshold, which no error of the matrix enters enlarged. The leading
    subspaces are those of the matrix without their residual.

    Args:
        core: the sum.
        factor: its polar factor.
        lead: its leading subspaces.
        share: of the nuclear norm.
        rounding: norm of rounding errors of the sum.
        exact: whether no other solver could know the subspaces better: if rounding decides the index, either is right.
    """
    values, root = lead.cut.values, math.sqrt(factor.rank)
    if not factor.rank:
        return factor.matrix, factor.certificate
    level, largest = _least(values, share).level, float(values[0])
    P, S, Qh = svd(lead.core)
    raised = torch.where(largest * RANK_TOLERANCE < S, (S - level).clamp(min=0), 0)
    boosted = (lead.U @ (P * raised)) @ (Qh @ lead.Vh)
    boosted += level * factor.matrix
    size = frobenius_norm(boosted)
    errors = lead.value_errors + rounding
    others = [_least((values + sign * errors).clamp(min=0), share).level for sign in (1, -1)]
    chosen = max(abs(other - level) for other in others)
    known = float(errors.amax())
    smallest = largest / factor.condition
    error = level * root * (factor.certificate.error + 2 * rounding / (smallest * root))
    error += 2 * known * root + (lead.residual + lead.certificate.orthogonality + BACKWARD_ERROR) * frobenius_norm(core)
    with_choice = (error + 2 * chosen * root) / size
    tolerance = factor.certificate.tolerance
    arbitrary = exact and error / size <= tolerance < with_choice
    certificate = replace(
        factor.certificate,
        error=error / size if arbitrary else with_choice,
        subspace_error=lead.certificate.subspace_error,
        arbitrary=factor.certificate.arbitrary or arbitrary,
        escalations=(*factor.certificate.escalations, *lead.certificate.escalations),
    )
    return boosted, certificate
