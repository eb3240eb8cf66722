"""Task Singular Vectors Merging (TSV-Merge)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import BeforeValidator, Field
from torch import Tensor

from .. import dispatch
from ..linalg import (
    Factored,
    Mode,
    Rank,
    Solver,
    TsvMerge,
    fixed_rank,
    interference_above_chance,
    tsv_merge,
    tsv_merge_bytes,
    tsv_merge_flops,
)
from ..linalg.products.cuda_graph import PRODUCTS
from ..ops import add_update
from ..sizes import parse_size
from .base import (
    Cost,
    FiniteFloat,
    MergeResult,
    MethodParameters,
    TensorJob,
    TensorReport,
    always,
    register,
    task_matrices,
    timed,
)

# An eighth of what `tsv_merge` takes by itself: no slower, measured, and tall matrices need half as much memory. It
# decides how sums are rounded, so no memory budget changes it.
WORKSPACE = 64 << 20


class TsvmParameters(MethodParameters):
    """Parameters of `tsvm`."""

    alpha: FiniteFloat = Field(default=1.0, alias="lambda", description="scale of the merged task vector")
    mode: Mode = Field(default="exact", description="exact (1e-4 of float64) or fast (1e-2)")
    solver: Solver = Field(default="eigen", description="eigen, or products (tensor cores)")
    workspace: Annotated[int, BeforeValidator(parse_size), Field(ge=1)] = Field(
        default=WORKSPACE, description="memory for copies of rows, e.g. 64MB: less takes longer, and rounds otherwise"
    )
    exclude_keys: list[str] = Field(
        default=[], description="names (or patterns with *) of matrices that get the mean task vector instead"
    )


def spectral_cost(job: TensorJob, options: TsvmParameters, ranks: Sequence[int]) -> Cost:
    """Return what TSV-Merge takes with its task matrices, at these ranks or smaller ones."""
    shape = (job.shape[0], job.shape[1])
    matrices = job.tasks * job.itemsize * job.elements
    simulated = dispatch.by_reference(job.device_type, *PRODUCTS)
    solving = tsv_merge_bytes(
        shape,
        ranks,
        itemsize=job.itemsize,
        solver=options.solver,
        workspace=options.workspace,
        simulated=simulated,
    )
    forming, adding = 2 * job.itemsize * job.elements, (5 * job.itemsize + 1) * job.elements  # one after the other
    return Cost(matrices + max(forming, solving, adding), tsv_merge_flops(shape, ranks))


def tsvm_cost(job: TensorJob, options: TsvmParameters) -> Cost:
    """Return what `tsvm` takes."""
    return spectral_cost(job, options, [fixed_rank((job.shape[0], job.shape[1]), job.tasks)] * job.tasks)


@register(
    "tsvm",
    pretty_name="TSV-Merge",
    paper_url="https://arxiv.org/abs/2412.00081",
    parameters=TsvmParameters,
    aliases=("task_singular_vector",),
    matrices_only=True,
    rank_per_task=True,
    factored=always,
    cost=tsvm_cost,
)
def tsvm(base: Tensor, tuned: Sequence[Tensor | Factored], options: TsvmParameters) -> MergeResult:
    """Return ``W_0 + alpha * TSV-Merge(D_1 .. D_T)`` at the uniform rank ``floor(min(m, n) / T)``.

    Gargiulo et al., CVPR 2025. A matrix with fewer rows or columns than tasks has rank 0 to give away: it stays the
    base's, as in the published code.
    """
    ranks = [fixed_rank((base.shape[0], base.shape[1]), len(tuned))] * len(tuned)
    report = TensorReport(weights=list(options.weight))
    merged = merge_and_report(task_matrices(base, tuned)[0], ranks, options, report)
    return MergeResult(add_update(base, merged.matrix, options.alpha), report)


def merge_and_report(
    matrices: Sequence[Tensor | Factored], ranks: Sequence[Rank], options: TsvmParameters, report: TensorReport
) -> TsvMerge:
    """Merge with the weights of the report, and note in it what was measured."""
    with timed(report.stages, "spectral"):
        merged = tsv_merge(
            matrices, ranks, report.weights, mode=options.mode, solver=options.solver, workspace=options.workspace
        )
    report.ranks, report.captured_energy = list(merged.ranks), list(merged.captured_energy)
    report.certificate = merged.certificate
    sides = zip(merged.interference, matrices[0].shape, strict=True)
    above = [interference_above_chance(overlap, merged.ranks, size) for overlap, size in sides]
    report.interference = [value for value in above if value is not None]
    return merged
