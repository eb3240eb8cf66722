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

from ..linalg import Certificate, Factored, core_space, fixed_rank, nonzero_support, truncated_svd
from ..linalg.decompositions import frobenius_norm
from ..ops import add_update
from .base import SPECTRAL_OPS, Cost, Linear, TensorJob, always, get_method, register, task_matrices
from .common_basis import CommonBasisParameters, merge_parts, part_norms
from .iso_c import IsoCParameters, iso_c
from .reports import MergeResult, Summands, TensorReport, total_norm


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


def core_space_summands(base: Tensor, tuned: Sequence[Any], options: CoreSpaceParameters) -> Summands:
    """Return ``U_B M'_t V_A`` of each task, where the M'_t are the summands of the merge of the cores."""
    report = TensorReport(weights=list(options.weight))
    factors, rows, columns = _factors(base, tuned, options, report)
    total, parts = _merge_cores(factors, options, report, apart=True)
    lefts = [base.new_zeros(base.shape[0], part.left.shape[1], dtype=torch.float64) for part in parts]
    rights = [base.new_zeros(part.right.shape[0], base.shape[1], dtype=torch.float64) for part in parts]
    for part, left, right in zip(parts, lefts, rights, strict=True):
        left[rows], right[:, columns] = part.left, part.right
    error = report.certificate.error * max(frobenius_norm(total), total_norm(parts)) if report.certificate else 0.0
    return Summands([Factored(*pair) for pair in zip(lefts, rights, strict=True)], report, error)


def core_space_refusal(options: CoreSpaceParameters) -> str | None:
    """Return why the merge is not linear in the weights."""
    if options.inner_method not in ("tsvm", "task_arithmetic"):
        return f"the inner method {options.inner_method} is not; tsvm and task_arithmetic are"
    return "isotropize is not" if options.isotropize else None


def core_space_ranks(job: TensorJob, options: CoreSpaceParameters, factored: Sequence[int]) -> list[int] | None:
    """Return upper bounds of the ranks of the summands."""
    if options.inner_method == "task_arithmetic":
        return list(factored) or None
    if not factored:  # a task that changes nothing, which only its values show, leaves its rank to the others
        return None
    tasks = sum(rank > 0 for rank in factored)
    share = fixed_rank((min(*job.shape, sum(factored)),) * 2, max(1, tasks))
    return [min(share, rank) for rank in factored]


@register(
    "core_space",
    pretty_name="Core Space",
    paper_url="https://arxiv.org/abs/2509.17786",
    parameters=CoreSpaceParameters,
    rounds=True,
    ops=SPECTRAL_OPS,
    matrices_only=True,
    isotropic=lambda options: bool(options.isotropize),
    factored=always,
    cost=core_space_cost,
    linear=Linear(core_space_summands, core_space_refusal, core_space_ranks),
)
def core_space_merge(
    base: Tensor, tuned: Sequence[Any], options: CoreSpaceParameters, out_dtype: torch.dtype | None = None
) -> MergeResult:
    """Merge by Core Space: the formula at the top of this module.

    Examples:
        >>> base = torch.zeros(30, 20)
        >>> updates = [Factored(torch.randn(30, 2), torch.randn(2, 20)) for _ in range(2)]
        >>> core_space_merge(base, updates, CoreSpaceParameters(weight=[1.0] * 2, density=[1.0] * 2)).report.ranks
        [2, 2]
    """
    dtype = task_matrices(base, tuned)[1]
    report = TensorReport(weights=list(options.weight))
    factors, rows, columns = _factors(base, tuned, options, report)
    total = torch.zeros_like(base, dtype=torch.float64)
    total[rows[:, None], columns] = _merge_cores(factors, options, report)[0]
    if report.certificate is not None:
        report.certificate = report.certificate.rounded(dtype)
    return MergeResult(add_update(base, total.to(dtype), options.alpha, out_dtype=out_dtype), report)


def _factors(
    base: Tensor, tuned: Sequence[Any], options: CoreSpaceParameters, report: TensorReport
) -> tuple[list[Factored], Tensor, Tensor]:
    """Return factors of the task matrices, and the indices of the rows and columns of the base that they stand for."""
    if isinstance(tuned[0], Factored):
        rows, columns = (torch.arange(size, device=base.device) for size in base.shape)
        return list(tuned), rows, columns
    dense = [matrix for matrix in task_matrices(base, tuned)[0] if isinstance(matrix, Tensor)]
    rows, columns = nonzero_support(dense)
    return [_factorize(matrix[rows[:, None], columns], options, report) for matrix in dense], rows, columns


def _merge_cores(
    matrices: list[Factored], options: CoreSpaceParameters, report: TensorReport, *, apart: bool = False
) -> tuple[Tensor, list[Factored]]:
    """Return the merged update and, if they are wanted `apart`, its summand of each task."""
    given, tasks = matrices, list(range(len(matrices)))
    if options.inner_method == "tsvm":  # it divides the rank among the tasks; those that change nothing get none
        tasks = [t for t, matrix in enumerate(matrices) if matrix.left.shape[1]] or [0]
        options = options.model_copy(update={"weight": tuple(options.weight[t] for t in tasks)})
        matrices = [matrices[t] for t in tasks]
    space = core_space(matrices)
    if not space.left.shape[1]:
        return space.left @ space.right, [Factored(space.left, space.right) for _ in given if apart]
    if apart:
        inner = _summands_of_cores(space.cores, options)
        summands = [_as_factors(part) for part in inner.parts]
        core, of_inner = torch.stack([part.dense() for part in summands]).sum(0), inner.report
    else:
        result = merge_parts(space.cores, options.inner_method, options)
        core, of_inner, summands = result.weight, result.report, []
    if options.isotropize:
        core = iso_c(torch.zeros_like(core), [core], IsoCParameters(mode=options.mode)).weight
    report.ranks = of_inner.ranks or [space.left.shape[1]] * len(options.weight)
    of_cores, of_merge = report.certificate, of_inner.certificate
    found = [certificate for certificate in (of_merge, of_cores) if certificate is not None]
    if found:
        norms = part_norms(space.cores, options.inner_method, options)
        known = replace(Certificate.worst(found), error=space.error + (of_cores.error if of_cores else 0.0))
        summed = Certificate.of_sum([known] * len(norms), norms, core)  # the cores may cancel each other
        report.certificate = replace(summed, error=summed.error + (of_merge.error if of_merge else 0.0))
    outer = {
        t: Factored(space.left @ (part.left * part.scale), part.right @ space.right)
        for t, part in zip(tasks, summands, strict=False)
    }
    nothing = Factored(space.left[:, :0], space.right[:0])
    return space.left @ core @ space.right, [outer.get(t, nothing) for t in range(len(given)) if apart]


def _as_factors(part: Tensor | Factored) -> Factored:
    """Return a matrix as a product."""
    if isinstance(part, Factored):
        return part
    return Factored(part, torch.eye(part.shape[1], dtype=part.dtype, device=part.device))


def _summands_of_cores(cores: Sequence[Tensor], options: CoreSpaceParameters) -> Summands:
    """Return the summands of the merge of the cores by the inner method."""
    if options.inner_method == "task_arithmetic":
        return Summands(list(cores), TensorReport(weights=list(options.weight)))
    inner = get_method("tsvm")
    assert inner.linear is not None
    shared: dict[str, Any] = {"weight": options.weight, "mode": options.mode}
    parameters = inner.parameters(**shared)
    return inner.linear.run(torch.zeros_like(cores[0]), cores, parameters)


def _factorize(matrix: Tensor, options: CoreSpaceParameters, report: TensorReport) -> Factored:
    """Return the SVD of a matrix as two factors that share its singular values."""
    U, S, Vh = found = truncated_svd(matrix, min(matrix.shape), mode=options.mode)
    certificates = [found.certificate, *([report.certificate] if report.certificate else [])]
    report.certificate = Certificate.worst(certificates)
    roots = S.sqrt()
    return Factored(U * roots, roots[:, None] * Vh)
