"""R-TSVM: TSV-Merge with outlier-aware reweighting, magnitude pruning and a rank for each task.

W_0 is the base weight (m, n), W_t that of fine-tune t = 1 .. T, ``D_t = W_t - W_0`` its task matrix, r = min(m, n), and
``a = |D_t|`` element by element; ``mean`` and ``sd`` (the population standard deviation) are over all elements.

1. Outliers: ``theta_t = mean(a) + kappa * sd(a)``, with the mass ``q_t = sum(a[a > theta_t]) / sum(a)``.
2. Reweighting, one of: ``clip``, ``D_t <- sign(D_t) * min(a, theta_t)``; ``damp``, ``w_t <- w_t * T (1 - q_t) /
   sum_s (1 - q_s)``; ``boost``, ``w_t <- w_t * T q_t / sum_s q_s``; or none.
3. Pruning: keep the ``ceil(density * m n)`` largest magnitudes of D_t, set the others to 0.
4. Sparsity: ``z_t`` is the share of elements of the pruned D_t that are at most ``eps * mean(a)``, with the mean of
   step 1. Pruned elements are 0 and count.
5. Rank: ``k_t = max(1, floor(r / T * (1 - z_t)^rho))``, or another rule of `choose_rank`; at most
   ``max(1, floor(r / T))``.
6. TSV-Merge: U_t and V_t are the k_t leading left and right singular vectors of D_t, ``H_t = U_t^T D_t V_t``, and polar
   is the orthogonal factor of the polar decomposition::

       W = W_0 + alpha * polar([U_1 .. U_T]) blockdiag(w_1 H_1 .. w_T H_T) polar([V_1 .. V_T])^T

Source: Yang et al., arXiv 2502.06876. The abstract names the ingredients of steps 1 to 5: outlier-aware parameter
weighting and sparsity-adaptive rank selection. Their formulas are our reconstruction, as we could not read the paper's;
each open choice is a parameter. Step 6 is Gargiulo et al., "Task Singular Vectors", CVPR 2025, algorithm 1.

Steps 1 to 5 are `ops.task_statistics`, `ops.reweight_prune`, `ops.outlier_weights`, `ops.pruned_sparsity` and
`linalg.choose_rank`; step 6 is `linalg.tsv_merge`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator, Field
from torch import Tensor

from ..linalg import Factored, RankRule, choose_rank
from ..ops import OutlierWeighting, add_update, outlier_weights, pruned_sparsity, reweight_prune, task_statistics
from .base import FiniteFloat, MergeResult, PerModel, TensorReport, register, timed
from .gram import checked
from .spectral_costs import rtsvm_cost
from .tsvm import TsvmParameters, merge_and_report


def _whole(value: object) -> object:
    return int(value) if isinstance(value, float) and value >= 1 else value  # gradients of ranks give fractions


class RtsvmParameters(TsvmParameters):
    """Parameters of `rtsvm`."""

    outlier_sigma: float = Field(default=3.0, ge=0, description="kappa: outliers are above mean + kappa * sd")
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


def keeps_factors(options: RtsvmParameters) -> bool:
    """Whether no step needs single elements of the task matrices, so that products of factors can be used."""
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
    """Merge by R-TSVM: the steps at the top of this module.

    Examples:
        >>> base = torch.zeros(30, 20)
        >>> tuned = [base + torch.randn(30, 20, generator=torch.Generator().manual_seed(t)) for t in range(3)]
        >>> options = RtsvmParameters(weight=[1.0] * 3, density=[1.0] * 3)
        >>> rtsvm(base, tuned, options).report.ranks  # at most 20 / 3
        [6, 6, 6]
    """
    report = TensorReport(weights=list(options.weight))
    if isinstance(tuned[0], Factored):
        task_matrices, sparsities = list(tuned), [0.0] * len(tuned)
    else:
        with timed(report.stages, "statistics"):
            statistics = task_statistics(base, tuned, sigma=options.outlier_sigma, eps=options.sparsity_eps)
            checked(statistics.sd)  # an overflow would hide all outliers
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
