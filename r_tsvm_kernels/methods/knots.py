"""KnOTS: align the task matrices by one SVD of all of them, concatenated, then merge them in its basis.

With the SVD of the concatenated task matrices ``D_t = W_t - W_0``, ``[D_1 .. D_T] = U S [V_1^T .. V_T^T]``::

    W = W_0 + alpha * U merge(S V_1^T .. S V_T^T)

The merge of `inner_method` is TIES (its disjoint mean), DARE and TIES, the weighted mean or the weighted sum.

Source: Stoica et al., "Model merging with SVD to tie the Knots", ICLR 2025, section 4.2; S multiplies the parts, as in
the published code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..linalg import BACKWARD_ERROR, Certificate, Factored, JointSvd, joint_svd, nonzero_support
from ..linalg.decompositions import frobenius_norm
from ..linalg.eigenspaces import MEASURED, PROBES
from ..ops import add_update
from .base import SPECTRAL_OPS, Cost, TensorJob, always, register, task_matrices
from .common_basis import CommonBasisParameters, merge_parts, part_norms
from .reports import MergeResult, TensorReport


class KnotsParameters(CommonBasisParameters):
    """Parameters of `knots`."""

    inner_method: Literal["ties", "dare_ties", "linear", "task_arithmetic"] = Field(
        default="ties", description="merges the parts of the tasks in the common basis"
    )


def knots_cost(job: TensorJob, options: KnotsParameters) -> Cost:
    """Return the cost of `knots`: all task matrices side by side, and their singular vectors."""
    (m, n), T = job.shape, job.tasks
    short = min(m, T * n)
    elements = T * job.elements
    return Cost(
        2 * job.itemsize * elements + 8 * (9 * elements + 16 * short**2), 8.0 * short * elements + 9.0 * short**3
    )


@register(
    "knots",
    pretty_name="KnOTS",
    paper_url="https://arxiv.org/abs/2410.19735",
    parameters=KnotsParameters,
    rounds=True,
    ops=SPECTRAL_OPS,
    aliases=("knots_ties",),
    matrices_only=True,
    factored=always,
    cost=knots_cost,
)
def knots(
    base: Tensor, tuned: Sequence[Any], options: KnotsParameters, out_dtype: torch.dtype | None = None
) -> MergeResult:
    """Merge by KnOTS: the formula at the top of this module.

    Examples:
        >>> base = torch.zeros(30, 20)
        >>> updates = [Factored(torch.randn(30, 2), torch.randn(2, 20)) for _ in range(2)]
        >>> knots(base, updates, KnotsParameters(weight=[1.0] * 2, density=[1.0] * 2)).report.ranks
        [4, 4]
    """
    matrices, dtype = task_matrices(base, tuned)
    if isinstance(tuned[0], Factored):
        found = joint_svd(tuned)
        merged = merge_parts(found.parts, options.inner_method, options).weight
        total = found.U @ merged
    else:
        dense = [matrix for matrix in matrices if isinstance(matrix, Tensor)]
        rows, columns = nonzero_support(dense)
        found = joint_svd([matrix[rows[:, None], columns] for matrix in dense], mode=options.mode)
        total = torch.zeros_like(base, dtype=torch.float64)
        merged = merge_parts(found.parts, options.inner_method, options).weight
        total[rows[:, None], columns] = found.U @ merged
    certificate = _certify(found, merged, options).rounded(dtype)
    certificate.require()
    report = TensorReport(ranks=[found.U.shape[1]] * len(tuned), weights=list(options.weight), certificate=certificate)
    return MergeResult(add_update(base, total.to(dtype), options.alpha, out_dtype=out_dtype), report)


def _certify(found: JointSvd, merged: Tensor, options: KnotsParameters) -> Certificate:
    """Return the certificate of the merged parts in the common basis."""
    norms = part_norms(found.parts, options.inner_method, options)
    if options.inner_method not in ("linear", "task_arithmetic"):
        return Certificate.of_sum([found.certificate] * len(norms), norms, merged)
    # A sum depends on the basis only through the parts outside it. These may cancel too, so their sum is measured.
    lacking = merge_parts(found.rest, options.inner_method, options).weight
    rounding = replace(found.certificate, error=BACKWARD_ERROR + found.certificate.orthogonality, arbitrary=False)
    summands = [rounding] * len(norms) + [replace(rounding, error=MEASURED)]
    return Certificate.of_sum(summands, [*norms, frobenius_norm(lacking) / math.sqrt(PROBES)], merged)
