"""R-TSVM (RESM): TSV-Merge with outlier-aware weighting, pruning and a rank for each task.

W_0 is the base weight (m, n), W_t that of fine-tune t = 1 .. T, ``D_t = W_t - W_0`` its task matrix, r = min(m, n), and
``a = |D_t|`` element by element; ``mean`` and ``sd`` (the population standard deviation) are over all elements. Where a
step has several readings, the first one is the default.

1. Outliers (kappa: `outlier_sigma`), by `outlier_statistic`:
   magnitude: a > theta_t with theta_t = mean(a) + kappa * sd(a);
   signed: |D_t - mean(D_t)| > kappa * sd(D_t).
   Measure q_t, by `outlier_measure`:
   share: sum of a over the outliers / sum of a; mass: sum of a over the outliers; count: outliers / (m n).
2. Weighting, by `outlier_weighting`. Element by element, with weights 1:
   clip: D_t <- sign(D_t) * min(a, theta_t), for signed outliers to mean(D_t) +- kappa * sd(D_t);
   remove: outliers <- 0; keep: all others <- 0; none: D_t stays.
   Of whole tasks, with q_t at least 0.1 * mean(q) and exponent e (`outlier_exponent`):
   damp: w_t ~ q_t^-e; boost: w_t ~ q_t^e; complement: w_t ~ 1 - q_t (as measured, no exponent).
   Their scale, by `weight_normalization`: mean: mean(w) = 1; sum: sum(w) = 1.
3. Pruning, by `pruning`: count: keep the ceil(density * m n) largest magnitudes, set the others to 0;
   threshold: set the small elements of step 4 to 0. With `prune_first`, this precedes step 1, which then measures the
   pruned matrix, zeros included; the unit u_t of a threshold is then that of the whole matrix.
4. Sparsity: elements with |D_t| <= eps * u_t (eps: `sparsity_eps`) of the matrix after steps 2 and 3 are small. u_t, by
   `sparsity_relative`: mean: mean(a); max: max(a); absolute: 1; with the a of step 1.
   z_t, by `sparsity_scope`: task: share of the small elements of D_t; consensus: share of the elements that are small
   in every task, for all t. Pruned elements are 0 and count.
5. Rank, by `rank`, with rho (`rank_rho`) of either sign:
   sparsity: k_t = floor(r / T * (1 - z_t)^rho); sparsity_power: k_t = floor(r / T * (1 - z_t^rho));
   fixed: k_t = floor(r / T); a whole number: k_t; a number f below 1: k_t = floor(f * r);
   energy: the smallest k_t whose squared singular values hold the share `rank_energy` of their sum;
   noise: the singular values above the edge of Gavish and Donoho; full: k_t = r.
   All these are at least 1 and, for q = 0 in step 6, at most max(1, floor(r / T)).
   shared: sum(k) = r and k_t ~ (1 - z_t)^rho, at least 1, with no other limit.
   auto: full if q > 0 in step 6, sparsity if q = 0.
6. Merging, with the w_t of step 2 times the weights of the models. U_t S_t V_t^T is the SVD of D_t with the k_t leading
   triplets, polar the orthogonal factor of the polar decomposition, n_t = norm(D_t) (Frobenius), q the
   `orthogonalization_power`::

       [P_1 .. P_T] = polar([U_1 (S_1 / n_1)^q .. U_T (S_T / n_T)^q]),   Q_t from the V_t in the same way
       M_t = P_t S_t Q_t^T,   W = W_0 + alpha * kappa * sum_t w_t g_t M_t

   q = 0 is TSV-Merge. For rectangles and q > 0 see `linalg.weighted_merge`.
   Damping c: g_t = 1 / (1 + c * delta * rho_t^2), with rho_t = norm2(D_t) / max(norm2(W_0), max_s norm2(D_s)) (the
   largest singular values) and delta = 1 - norm(mean_s D_s)^2 / mean_s norm(D_s)^2.
   Retention p: kappa = x^-p with x = mean_t <sum_s M_s, D_t> / n_t^2, between 1/4 and 1;
   auto: p = (1 - c)^4 / 2 with the mean cosine c >= 0 of all pairs of D_t.

Source: Yang et al., arXiv 2502.06876; the preprint calls the method R-TSVM, the NeurIPS 2025 paper RESM. Its abstract
names two ingredients: outlier-aware weighting (steps 1 and 2) and sparsity-adaptive rank selection (steps 4 and 5). We
could not read its formulas: those of steps 1 to 5, and the defaults, are ours. Step 3 is our addition: the abstract
reports pruning of redundant components as a finding, not as an ingredient. Step 6 with q = 0, c = 0 and p = 0 is
Gargiulo et al., "Task Singular Vectors", CVPR 2025, algorithm 1; q, damping and retention are ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor

from ..errors import ConfigError
from ..linalg import Factored, Rank, RankRule, asked_rank, limited, rank_limit, shared_ranks
from ..linalg.products.cuda_graph import PRODUCTS
from ..ops import OutlierClipping, add_update, pruned_sparsity, reweight_prune, task_statistics
from .base import SPECTRAL_OPS, FiniteFloat, Linear, MethodParameters, PerModel, TensorJob, register
from .gram import checked
from .orthogonalization import merge_weighted_and_report, summands_of_weighted
from .reports import MergeResult, Summands, TensorReport, timed
from .rtsvm_readings import (
    Normalization,
    OutlierMeasure,
    OutlierStatistic,
    OutlierWeighting,
    Prepared,
    Pruning,
    SparsityScope,
    SparsityUnit,
    needs_torch,
    outlier_weights,
    prepared_in_torch,
)
from .spectral_costs import largest_ranks, rtsvm_cost
from .tsvm import TsvmParameters, merge_and_report, summands_of_tsvm, tsvm_batch_size

# What `preset` sets, unless a recipe sets it itself. ``reconstruction`` is our reading of the paper; ``weighted`` is
# what benchmarks/quality/README.md offers, with the power that needs no SVD.
TSV_MERGE = {"orthogonalization_power": 0.0, "damping": 0.0, "retention": 0.0}
PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "weighted": {"outlier_weighting": "none", "rank": "full"}
    | {"orthogonalization_power": 1.0, "damping": 2.0, "retention": "auto"},
    "reconstruction": TSV_MERGE | {"outlier_weighting": "clip", "rank": "sparsity"},
    "tsvm": TSV_MERGE | {"outlier_weighting": "none", "rank": "fixed"},
}
Preset = Literal["default", "weighted", "reconstruction", "tsvm"]

# Rules of ranks that look at the sparsities.
SPARSITY_RULES = {"sparsity", "sparsity_power", "shared"}


def _whole(value: object) -> object:
    return int(value) if isinstance(value, float) and value >= 1 else value  # gradients of ranks give fractions


class RtsvmParameters(TsvmParameters):
    """Parameters of `rtsvm`."""

    outlier_sigma: float = Field(default=3.0, ge=0, description="kappa: outliers are above mean + kappa * sd")
    outlier_statistic: OutlierStatistic = Field(
        default="magnitude", description="outliers among the magnitudes or the signed values"
    )
    outlier_measure: OutlierMeasure = Field(default="share", description="q_t: share, mass or count of the outliers")
    outlier_weighting: OutlierWeighting = Field(
        default="clip", description="of elements: clip, remove, keep; of tasks: damp, boost, complement; or none"
    )
    outlier_exponent: FiniteFloat = Field(default=1.0, gt=0, description="exponent of q_t for damp and boost")
    weight_normalization: Normalization = Field(
        default="mean", description="what is 1 of the weights of tasks: their mean or their sum"
    )
    density: PerModel[Annotated[float, Field(ge=0, le=1)]] = Field(
        default=(1.0,), description="fraction of each task matrix kept by magnitude pruning"
    )
    pruning: Pruning = Field(default="count", description="by count (density), or by threshold (sparsity_eps)")
    prune_first: bool = Field(default=False, description="prune before outliers are measured, not after")
    sparsity_eps: FiniteFloat = Field(default=0.1, ge=0, description="small means at most eps * mean magnitude")
    sparsity_relative: SparsityUnit = Field(
        default="mean", description="unit of sparsity_eps: mean or max magnitude, or absolute"
    )
    sparsity_scope: SparsityScope = Field(
        default="task", description="share of elements small in the task, or in every task (consensus)"
    )
    rank: PerModel[
        Annotated[
            Literal["auto"] | RankRule | Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, lt=1)],
            BeforeValidator(_whole),
        ]
    ] = Field(
        default=("auto",),
        description="auto, full, sparsity, sparsity_power, shared, fixed, energy, noise, a number, or a fraction of r",
    )
    rank_rho: FiniteFloat = Field(default=1.0, description="rho: exponent of the rules that use sparsity")
    rank_energy: float = Field(default=0.95, gt=0, le=1, description="eta: energy kept by the energy rule")
    orthogonalization_power: FiniteFloat = Field(
        default=0.0, ge=0, description="q: directions weigh (s / norm)^q when orthogonalised; 0 is TSV-Merge"
    )
    damping: FiniteFloat = Field(default=0.0, ge=0, description="c: damps tasks that are far from the base")
    retention: Literal["auto"] | FiniteFloat = Field(
        default=0.0, description="p: gives back what orthogonalisation took, to this power; auto: by the mean cosine"
    )
    preset: Preset = Field(
        default="default", description="defaults of other parameters: weighted, reconstruction, tsvm or default"
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_in_preset(cls, values: Any) -> Any:
        """Set what the preset sets and the recipe does not."""
        if not isinstance(values, dict) or values.get("preset") not in PRESETS:
            return values
        chosen = dict(PRESETS[values["preset"]])
        rank = chosen.pop("rank", "auto")
        filled = {**chosen, **values}
        if "rank" in values:  # one for each model, "auto" where the recipe sets none
            given = values["rank"] if isinstance(values["rank"], list | tuple) else [values["rank"]]
            filled["rank"] = tuple(rank if rule == "auto" else rule for rule in given)
        else:
            filled["rank"] = (rank,)
        return filled

    @property
    def weighted(self) -> bool:
        """Whether step 6 is more than TSV-Merge."""
        return bool(self.orthogonalization_power or self.damping or self.retention)

    @property
    def rules(self) -> tuple[RankRule | int | float, ...]:
        """The rules of step 5, `auto` resolved."""
        automatic: RankRule = "full" if self.orthogonalization_power else "sparsity"
        return tuple(automatic if rule == "auto" else rule for rule in self.rank)

    def for_tensor(self, name: str) -> MethodParameters:
        """Refuse values that contradict each other before tensors are read."""
        if "shared" in self.rank and len(set(self.rank)) > 1:
            raise ConfigError("rank: shared divides r among all models; set it for all of them")
        if "sparsity_power" in self.rank and self.rank_rho < 0:
            raise ConfigError(f"rank_rho: sparsity_power needs an exponent >= 0, got {self.rank_rho}")
        if self.outlier_weighting == "complement" and self.outlier_measure == "mass":
            raise ConfigError("outlier_measure: complement is 1 - q, so it needs share or count, got mass")
        if self.pruning == "threshold" and min(self.density) < 1:
            raise ConfigError("density: pruning by threshold keeps what is above sparsity_eps; leave density at 1")
        return super().for_tensor(name)


def keeps_factors(options: RtsvmParameters) -> bool:
    """Whether no step needs single elements of the task matrices, so that products of factors can be used."""
    unchanged = options.outlier_weighting == "none" and options.pruning == "count" and min(options.density) == 1
    return unchanged and SPARSITY_RULES.isdisjoint(options.rules)


def merge_rtsvm_batch(
    bases: Sequence[Tensor],
    tuned: Sequence[Sequence[Tensor]],
    options: RtsvmParameters,
    out_dtype: torch.dtype | None = None,
) -> list[MergeResult]:
    """Merge several matrices by `rtsvm`, in one batch if the solver can."""
    layers, ranks, reports = zip(
        *(_matrices_and_ranks(base, models, options) for base, models in zip(bases, tuned, strict=True)), strict=True
    )
    if options.weighted:
        updates = merge_weighted_and_report(bases, layers, ranks, options, reports)
    else:
        updates = [merged.matrix for merged in merge_and_report(layers, ranks, options, reports)]
    results = []
    for base, update, own, report in zip(bases, updates, ranks, reports, strict=True):
        _add_ranks_asked(report, own)
        results.append(MergeResult(add_update(base, update, options.alpha, out_dtype=out_dtype), report))
    return results


def rtsvm_summands(base: Tensor, tuned: Sequence[Any], options: RtsvmParameters) -> Summands:
    """Return ``kappa w_t g_t M_t`` of each task with the w_t of step 2: see the top of this module."""
    matrices, ranks, report = _matrices_and_ranks(base, tuned, options)
    summands_of = partial(summands_of_weighted, base) if options.weighted else summands_of_tsvm
    found = summands_of(matrices, ranks, options, report)
    _add_ranks_asked(report, ranks)
    return found


def rtsvm_ranks(job: TensorJob, options: RtsvmParameters, factored: Sequence[int]) -> list[int] | None:
    """Return upper bounds of the ranks of the summands; weighted orthogonalisation mixes all directions."""
    if not options.weighted and "shared" not in options.rank:
        bounds = largest_ranks(job, options)
        return [min(*pair) for pair in zip(bounds, factored, strict=True)] if factored else bounds
    return [sum(factored)] * job.tasks if factored else None


def rtsvm_spread(tasks: int, options: RtsvmParameters) -> float:
    """Return how errors of summands add up: those that are not orthogonal may all point in one direction."""
    return math.sqrt(tasks) if options.orthogonalization_power else 1.0


@register(
    "rtsvm",
    pretty_name="R-TSVM",
    paper_url="https://arxiv.org/abs/2502.06876",
    parameters=RtsvmParameters,
    rounds=True,
    ops=(*SPECTRAL_OPS, *PRODUCTS, "magnitude_select", "reweight_prune", "task_gram"),
    aliases=("resm",),
    matrices_only=True,
    rank_per_task=True,
    mean_if_rankless=True,
    factored=keeps_factors,
    cost=rtsvm_cost,
    batch=tsvm_batch_size,
    run_batch=merge_rtsvm_batch,
    linear=Linear(rtsvm_summands, ranks=rtsvm_ranks, spread=rtsvm_spread),
)
def rtsvm(
    base: Tensor, tuned: Sequence[Any], options: RtsvmParameters, out_dtype: torch.dtype | None = None
) -> MergeResult:
    """Merge by R-TSVM: the steps at the top of this module.

    Examples:
        >>> base = torch.zeros(30, 20)
        >>> tuned = [base + torch.randn(30, 20, generator=torch.Generator().manual_seed(t)) for t in range(3)]
        >>> options = RtsvmParameters(weight=[1.0] * 3, density=[1.0] * 3, rank=["sparsity"] * 3)
        >>> rtsvm(base, tuned, options).report.ranks  # at most 20 / 3
        [6, 6, 6]
    """
    return merge_rtsvm_batch([base], [tuned], options, out_dtype)[0]


def _matrices_and_ranks(
    base: Tensor, tuned: Sequence[Any], options: RtsvmParameters
) -> tuple[list[Tensor | Factored], list[Rank], TensorReport]:
    """Take steps 1 to 5; return the task matrices, their limited ranks, and the report with the ranks asked for."""
    report = TensorReport(weights=list(options.weight))
    if isinstance(tuned[0], Factored):
        task_matrices, sparsities = list(tuned), [0.0] * len(tuned)
    else:
        with timed(report.stages, "statistics"):
            prepare = prepared_in_torch if needs_torch(options) else prepared_by_kernels
            prepared = prepare(base, tuned, options)
        task_matrices, sparsities = prepared.matrices, prepared.sparsities
        weights = outlier_weights(
            prepared.outliers,
            options.outlier_weighting,
            exponent=options.outlier_exponent,
            normalization=options.weight_normalization,
        )
        report.weights = [w * user for w, user in zip(weights, options.weight, strict=True)]
        report.sparsities, report.outlier_masses = sparsities, prepared.outlier_masses
    shape = (base.shape[0], base.shape[1])
    asked = _asked_ranks(options, shape, sparsities)
    unlimited = "shared" in options.rank or options.orthogonalization_power > 0
    limit = min(shape) if unlimited else rank_limit(shape, len(tuned))
    report.ranks_asked = [rank if isinstance(rank, int) else 0 for rank in asked]
    return task_matrices, [limited(rank, limit) for rank in asked], report


def _add_ranks_asked(report: TensorReport, ranks: Sequence[Rank]) -> None:
    """Add the ranks that rules asked for, which are known after the merge."""
    pairs = zip(ranks, report.ranks_asked, strict=True)
    report.ranks_asked = [getattr(rank, "asked", wanted) for rank, wanted in pairs]


def prepared_by_kernels(base: Tensor, tuned: Sequence[Tensor], options: RtsvmParameters) -> Prepared:
    """Take steps 1 to 4 in the readings that the kernels compute, see `needs_torch`."""
    statistics = task_statistics(base, tuned, sigma=options.outlier_sigma, eps=options.sparsity_eps)
    checked(statistics.sd)  # an overflow would hide all outliers
    clipping: OutlierClipping = "clip" if options.outlier_weighting == "clip" else "none"
    density, eps = options.density, options.sparsity_eps
    matrices = reweight_prune(base, tuned, statistics, outlier_weighting=clipping, density=density)
    sparsities = pruned_sparsity(statistics, outlier_weighting=clipping, density=density, eps=eps)
    shares, outliers = statistics.outlier_mass, statistics.outlier_mass
    if options.outlier_measure == "mass":
        outliers = shares * statistics.mean * statistics.numel
    return Prepared(matrices, sparsities, shares.tolist(), outliers.tolist())


def _asked_ranks(options: RtsvmParameters, shape: tuple[int, int], sparsities: Sequence[float]) -> list[Rank]:
    """Return the ranks of step 5, before their limit."""
    if "shared" in options.rank:
        return list(shared_ranks(shape, sparsities, options.rank_rho))
    tasks, rho, energy = len(sparsities), options.rank_rho, options.rank_energy
    return [
        asked_rank(rule, shape, tasks, sparsity=sparsity, rho=rho, energy=energy)
        for rule, sparsity in zip(options.rules, sparsities, strict=True)
    ]
