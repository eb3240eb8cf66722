"""Core Space: low-rank task matrices, merged as small cores between common bases.

``D_t = B_t A_t`` is the task matrix of an adapter. U_B are the left singular vectors of ``[B_1 .. B_T]``, V_A the right
ones of ``[A_1; ..; A_T]``, and ``M_t = U_B^T D_t V_A^T`` is the core of task t::

    W = W_0 + alpha * U_B merge(M_1 .. M_T) V_A

with the merge of `inner_method`. A matrix that is not factored counts as ``(U sqrt(S)) (sqrt(S) V^T)``; TIES and DARE,
which look at single elements of the cores, depend on this choice.

Source: Panariello et al., "Accurate and Efficient Low-Rank Model Merging in Core Space", NeurIPS 2025, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..linalg import Certificate, Factored, core_space, nonzero_support, truncated_svd
from ..ops import add_update
from .base import SPECTRAL_OPS, Cost, MergeResult, TensorJob, TensorReport, always, register, task_matrices
from .common_basis import CommonBasisParameters, merge_parts, part_norms
from .iso_c import IsoCParameters, iso_c


class CoreSpaceParameters(CommonBasisParameters):
    """Parameters of `core_space`."""

    inner_method: Literal["tsvm", "task_arithmetic", "linear", "ties", "dare_linear", "dare_ties"] = Field(
        default="tsvm", description="merges the cores of the tasks"
    )
    isotropize: bool = Field(default=False, description="make all singular values of the merged core equal")


def core_space_cost(job: TensorJob, options: CoreSpaceParameters) -> Cost:
    """Return the cost of `core_space` for dense task matrices: their SVDs, and bases of full rank."""
    (m, n), T = job.shape, job.tasks
    short, long = min(m, n), max(m, n)
    cores = T * m * n if T * short >= long else T * (T * short) ** 2
    bytes_ = T * job.itemsize * job.elements + 8 * (12 * T * (m + n) * short + 4 * cores + 24 * short**2)
    return Cost(bytes_, T * (8.0 * short * job.elements + 9.0 * short**3) + 12.0 * (m + n) * (T * short) ** 2)


@register(
    "core_space",
    pretty_name="Core Space",
    paper_url="https://arxiv.org/abs/2509.17786",
    parameters=CoreSpaceParameters,
    ops=SPECTRAL_OPS,
    matrices_only=True,
    factored=always,
    cost=core_space_cost,
)
def core_space_merge(base: Tensor, tuned: Sequence[Any], options: CoreSpaceParameters) -> MergeResult:
    """Merge by Core Space: the formula at the top of this module.

    Examples:
        >>> base = torch.zeros(30, 20)
        >>> updates = [Factored(torch.randn(30, 2), torch.randn(2, 20)) for _ in range(2)]
        >>> core_space_merge(base, updates, CoreSpaceParameters(weight=[1.0] * 2, density=[1.0] * 2)).report.ranks
        [2, 2]
    """
    matrices, dtype = task_matrices(base, tuned)
    report = TensorReport(weights=list(options.weight))
    if isinstance(tuned[0], Factored):
        total = _merge_cores(list(tuned), options, report)
    else:
        dense = [matrix for matrix in matrices if isinstance(matrix, Tensor)]
        rows, columns = nonzero_support(dense)
        total = torch.zeros_like(base, dtype=torch.float64)
        factors = [_factorize(matrix[rows[:, None], columns], options, report) for matrix in dense]
        total[rows[:, None], columns] = _merge_cores(factors, options, report)
    if report.certificate is not None:
        report.certificate = report.certificate.rounded(dtype)
    return MergeResult(add_update(base, total.to(dtype), options.alpha), report)


def _merge_cores(matrices: list[Factored], options: CoreSpaceParameters, report: TensorReport) -> Tensor:
    if options.inner_method == "tsvm":  # it divides the rank among the tasks; those that change nothing get none
        kept = [t for t, matrix in enumerate(matrices) if matrix.left.shape[1]]
        options = options.model_copy(update={"weight": tuple(options.weight[t] for t in kept)})
        matrices = [matrices[t] for t in kept] or matrices[:1]
    space = core_space(matrices)
    if not space.left.shape[1]:
        return space.left @ space.right
    result = merge_parts(space.cores, options.inner_method, options)
    core = result.weight
    if options.isotropize:
        core = iso_c(torch.zeros_like(core), [core], IsoCParameters(mode=options.mode)).weight
    report.ranks = result.report.ranks or [space.left.shape[1]] * len(options.weight)
    of_cores, of_merge = report.certificate, result.report.certificate
    found = [certificate for certificate in (of_merge, of_cores) if certificate is not None]
    if found:
        norms = part_norms(space.cores, options.inner_method, options)
        known = replace(Certificate.worst(found), error=space.error + (of_cores.error if of_cores else 0.0))
        summed = Certificate.of_sum([known] * len(norms), norms, core)  # the cores may cancel each other
        report.certificate = replace(summed, error=summed.error + (of_merge.error if of_merge else 0.0))
    return space.left @ core @ space.right


def _factorize(matrix: Tensor, options: CoreSpaceParameters, report: TensorReport) -> Factored:
    """Return the SVD of a matrix as two factors that share its singular values."""
    U, S, Vh = found = truncated_svd(matrix, min(matrix.shape), mode=options.mode)
    certificates = [found.certificate, *([report.certificate] if report.certificate else [])]
    report.certificate = Certificate.worst(certificates)
    roots = S.sqrt()
    return Factored(U * roots, roots[:, None] * Vh)
