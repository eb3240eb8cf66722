"""R-TSVM: Reweighting-enhanced Task Singular Vector Merging."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator, Field
from torch import Tensor

from ..linalg import Factored, RankRule, choose_rank, fixed_rank
from ..ops import (
    OutlierWeighting,
    add_update,
    kept_count,
    outlier_weights,
    pruned_sparsity,
    reweight_prune,
    task_statistics,
)
from .base import Cost, FiniteFloat, MergeResult, PerModel, TensorJob, TensorReport, register, timed
from .gram import checked
from .tsvm import TsvmParameters, merge_and_report, spectral_cost


def _whole(value: object) -> object:
    return int(value) if isinstance(value, float) and value >= 1 else value  # a gradient of ranks gives fractions


class RtsvmParameters(TsvmParameters):
    """Parameters of `rtsvm`."""

    outlier_sigma: float = Field(default=3.0, ge=0, description="kappa: outliers lie above mean + kappa * sd")
    outlier_weighting: OutlierWeighting = Field(default="clip", description="clip, damp, boost or none")
    density: PerModel[Annotated[float, Field(ge=0, le=1)]] = Field(
        default=(1.0,), description="fraction of each task matrix kept by magnitude pruning"
    )
    sparsity_eps: FiniteFloat = Field(default=0.1, ge=0, description="small means at most eps * mean magnitude")
    rank: Annotated[RankRule | Annotated[int, Field(ge=1)], BeforeValidator(_whole)] = Field(
        default="sparsity", description="sparsity, fixed, energy, noise, or a whole number"
    )
    rank_rho: FiniteFloat = Field(default=1.0, ge=0, description="rho: exponent of the sparsity rule")
    rank_energy: float = Field(default=0.95, gt=0, le=1, description="eta: energy kept by the energy rule")


def rtsvm_cost(job: TensorJob, options: RtsvmParameters) -> Cost:
    """Return what `rtsvm` takes: first statistics and pruning of one task after the other, then TSV-Merge."""
    statistics = (3 * job.itemsize + 28) * job.elements
    pruning = ((job.tasks + 5) * job.itemsize + 2) * job.elements
    merging = spectral_cost(job, options, _largest_ranks(job, options))
    return Cost(max(statistics, pruning, merging.bytes), merging.flops + 40.0 * job.tasks * job.elements)


def _largest_ranks(job: TensorJob, options: RtsvmParameters) -> list[int]:
    """Return upper bounds of the ranks: what pruning drops is small, whatever the values."""
    shape = (job.shape[0], job.shape[1])
    bounds = []
    for density in options.density:
        dropped = 1 - kept_count(density, job.elements) / job.elements
        rank = choose_rank(options.rank, shape, job.tasks, sparsity=dropped, rho=options.rank_rho)
        bounds.append(rank if isinstance(rank, int) else fixed_rank(shape, job.tasks))
    return bounds


def keeps_factors(options: RtsvmParameters) -> bool:
    """Whether nothing looks at single elements of the task matrices, so that they may be given as products."""
    return options.outlier_weighting == "none" and min(options.density) == 1 and options.rank != "sparsity"


@register(
    "rtsvm",
    pretty_name="R-TSVM",
    paper_url="https://arxiv.org/abs/2502.06876",
    parameters=RtsvmParameters,
    matrices_only=True,
    rank_per_task=True,
    mean_if_rankless=True,
    factored=keeps_factors,
    cost=rtsvm_cost,
)
def rtsvm(base: Tensor, tuned: Sequence[Any], options: RtsvmParameters) -> MergeResult:
    """Reweight, prune, choose a rank per task, then TSV-Merge (our reconstruction of Yang et al., 2025)."""
    report = TensorReport(weights=list(options.weight))
    if isinstance(tuned[0], Factored):
        task_matrices, sparsities = list(tuned), [0.0] * len(tuned)
    else:
        with timed(report.stages, "statistics"):
            statistics = task_statistics(base, tuned, sigma=options.outlier_sigma, eps=options.sparsity_eps)
            checked(statistics.sd)  # where it overflows, no outlier would be found
            weighting, density = options.outlier_weighting, options.density
            task_matrices = reweight_prune(base, tuned, statistics, outlier_weighting=weighting, density=density)
            sparsities = pruned_sparsity(
                statistics, outlier_weighting=weighting, density=density, eps=options.sparsity_eps
            )
        reweighting = outlier_weights(statistics, options.outlier_weighting)
        report.weights = [w * user for w, user in zip(reweighting, options.weight, strict=True)]
        report.sparsities, report.outlier_masses = sparsities, statistics.outlier_mass.tolist()
    shape = (base.shape[0], base.shape[1])
    ranks = [
        choose_rank(options.rank, shape, len(tuned), sparsity=z, rho=options.rank_rho, energy=options.rank_energy)
        for z in sparsities
    ]
    merged = merge_and_report(task_matrices, ranks, options, report)
    return MergeResult(add_update(base, merged.matrix, options.alpha), report)
