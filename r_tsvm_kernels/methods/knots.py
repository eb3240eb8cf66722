"""KnOTS: task matrices aligned by the SVD of all of them side by side, then merged in that basis."""

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
from .base import Cost, MergeResult, TensorJob, TensorReport, always, register, task_matrices
from .common_basis import InnerParameters, merge_parts, part_norms


class KnotsParameters(InnerParameters):
    """Parameters of `knots`."""

    inner_method: Literal["ties", "dare_ties", "linear", "task_arithmetic"] = Field(
        default="ties", description="merges the parts of the tasks in the common basis"
    )


def knots_cost(job: TensorJob, options: KnotsParameters) -> Cost:
    """Return what `knots` takes: all task matrices side by side, and their singular vectors."""
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
    aliases=("knots_ties",),
    matrices_only=True,
    factored=always,
    cost=knots_cost,
)
def knots(base: Tensor, tuned: Sequence[Any], options: KnotsParameters) -> MergeResult:
    """Return ``W_0 + alpha * U merge(S V_1 .. S V_T)`` with ``[D_1 .. D_T] = U S [V_1 .. V_T]``.

    The parts ``S V_t`` are merged by TIES (its disjoint mean), by DARE and TIES, by their weighted mean or their
    weighted sum (Stoica et al., ICLR 2025, section 4.2; merged as in the published code, which has S with the parts).
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
    certificate = _certificate(found, merged, options).rounded(dtype)
    certificate.require()
    report = TensorReport(ranks=[found.U.shape[1]] * len(tuned), weights=list(options.weight), certificate=certificate)
    return MergeResult(add_update(base, total.to(dtype), options.alpha), report)


def _certificate(found: JointSvd, merged: Tensor, options: KnotsParameters) -> Certificate:
    """Return the certificate of the merged parts in the common basis."""
    norms = part_norms(found.parts, options.inner_method, options)
    if options.inner_method not in ("linear", "task_arithmetic"):
        return Certificate.of_sum([found.certificate] * len(norms), norms, merged)
    # Sums do not depend on the basis but for what it lacks, which may cancel, too: its sum is measured.
    lacking = merge_parts(found.rest, options.inner_method, options).weight
    rounding = replace(found.certificate, error=BACKWARD_ERROR + found.certificate.orthogonality, arbitrary=False)
    summands = [rounding] * len(norms) + [replace(rounding, error=MEASURED)]
    return Certificate.of_sum(summands, [*norms, frobenius_norm(lacking) / math.sqrt(PROBES)], merged)
