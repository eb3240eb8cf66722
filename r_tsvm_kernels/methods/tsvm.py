"""TSV-Merge: the leading singular vectors of all tasks, made orthogonal to each other.

``D_t = W_t - W_0`` is the task matrix (m, n) of fine-tune t = 1 .. T, and ``k = floor(min(m, n) / T)`` the rank of each
task. U_t and V_t are the k leading left and right singular vectors of D_t, ``H_t = U_t^T D_t V_t``, and polar is the
orthogonal factor of the polar decomposition::

    W = W_0 + alpha * polar([U_1 .. U_T]) blockdiag(w_1 H_1 .. w_T H_T) polar([V_1 .. V_T])^T

Source: Gargiulo et al., "Task Singular Vectors", CVPR 2025, algorithm 1. `linalg.tsv_merge` computes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Literal

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor

from ..linalg import (
    Factored,
    Mode,
    Rank,
    Solver,
    TsvMerge,
    TsvParts,
    fixed_rank,
    interference_above_chance,
    tsv_merge_layers,
    tsv_parts,
)
from ..linalg.products.cuda_graph import PRODUCTS
from ..ops import add_update
from ..sizes import parse_size
from .base import SPECTRAL_OPS, FiniteFloat, Linear, MethodParameters, TensorJob, always, register, task_matrices
from .reports import MergeResult, Summands, TensorReport, timed, total_norm
from .spectral_costs import solver_for, tsvm_cost

# An eighth of the default of `tsv_merge`: measured to be no slower, and it halves the memory of tall matrices. It
# affects how sums are rounded, so it does not depend on the memory budget.
WORKSPACE = 64 << 20

# Elements of the task matrices and of their Gram matrices that solver `products` merges in one batch, on a GPU and
# where it is simulated, with the default workspace. A batch then needs no more memory than an MLP of a 7B model.
BATCH_ELEMENTS = {"cuda": 1 << 27, "cpu": 1 << 21}


class TsvmParameters(MethodParameters):
    """Parameters of `tsvm`."""

    alpha: FiniteFloat = Field(default=1.0, alias="lambda", description="scale of the merged task vector")
    mode: Mode = Field(default="exact", description="exact (1e-4 of float64) or fast (1e-2)")
    solver: Literal["auto", "eigen", "products"] = Field(
        default="auto", description="eigen, products (tensor cores), or auto: products on a GPU whose kernels passed"
    )
    workspace: Annotated[int, BeforeValidator(parse_size), Field(ge=1)] = Field(
        default=WORKSPACE,
        description="memory for copies of rows and for batches: less is slower and changes the last bits",
    )
    exclude_keys: list[str] = Field(
        default=[], description="names (or patterns with *) of matrices that get the mean task vector instead"
    )


def tsvm_batch_size(job: TensorJob, options: TsvmParameters) -> int:
    """Return the number of matrices to merge at a time: solver ``products`` merges equal shapes in one batch.

    A smaller workspace makes smaller batches.
    """
    if solver_for(options, job.device_type) != "products":
        return 1
    most = BATCH_ELEMENTS["cpu" if job.device_type == "cpu" else "cuda"] * options.workspace // WORKSPACE
    return max(1, most // max(1, job.tasks * (job.elements + min(job.shape) ** 2)))


def merge_tsvm_batch(
    bases: Sequence[Tensor],
    tuned: Sequence[Sequence[Tensor | Factored]],
    options: TsvmParameters,
    out_dtype: torch.dtype | None = None,
) -> list[MergeResult]:
    """Merge several matrices by `tsvm`, in one batch if the solver can."""
    ranks = [[fixed_rank((base.shape[0], base.shape[1]), len(models))] * len(models)
             for base, models in zip(bases, tuned, strict=True)]  # fmt: skip
    reports = [TensorReport(weights=list(options.weight), ranks_asked=list(own)) for own in ranks]
    matrices = [task_matrices(base, models)[0] for base, models in zip(bases, tuned, strict=True)]
    merged = merge_and_report(matrices, ranks, options, reports)
    return [
        MergeResult(add_update(base, found.matrix, options.alpha, out_dtype=out_dtype), report)
        for base, found, report in zip(bases, merged, reports, strict=True)
    ]


def tsvm_summands(base: Tensor, tuned: Sequence[Tensor | Factored], options: TsvmParameters) -> Summands:
    """Return ``polar(U)_t H_t polar(V)_t^T`` of each task: see the top of this module."""
    ranks = [fixed_rank((base.shape[0], base.shape[1]), len(tuned))] * len(tuned)
    matrices, _ = task_matrices(base, tuned)
    report = TensorReport(weights=list(options.weight), ranks_asked=list(ranks))
    return summands_of_tsvm(matrices, ranks, options, report)


def tsvm_ranks(job: TensorJob, options: TsvmParameters, factored: Sequence[int]) -> list[int]:
    """Return upper bounds of the ranks of the summands."""
    share = fixed_rank((job.shape[0], job.shape[1]), job.tasks)
    return [min(share, rank) for rank in factored] or [share] * job.tasks


@register(
    "tsvm",
    pretty_name="TSV-Merge",
    paper_url="https://arxiv.org/abs/2412.00081",
    parameters=TsvmParameters,
    rounds=True,
    ops=(*SPECTRAL_OPS, *PRODUCTS),
    aliases=("task_singular_vector",),
    matrices_only=True,
    rank_per_task=True,
    factored=always,
    cost=tsvm_cost,
    batch=tsvm_batch_size,
    run_batch=merge_tsvm_batch,
    linear=Linear(tsvm_summands, ranks=tsvm_ranks),
)
def tsvm(
    base: Tensor, tuned: Sequence[Tensor | Factored], options: TsvmParameters, out_dtype: torch.dtype | None = None
) -> MergeResult:
    """Merge by TSV-Merge: the formula at the top of this module.

    A matrix with fewer rows or columns than tasks gets rank 0 and keeps the base's value, as in the published code.

    Examples:
        >>> base = torch.zeros(30, 20)
        >>> tuned = [base + torch.randn(30, 20, generator=torch.Generator().manual_seed(t)) for t in range(3)]
        >>> tsvm(base, tuned, TsvmParameters(weight=[1.0] * 3)).report.ranks
        [6, 6, 6]
    """
    return merge_tsvm_batch([base], [tuned], options, out_dtype)[0]


def merge_and_report(
    layers: Sequence[Sequence[Tensor | Factored]],
    ranks: Sequence[Sequence[Rank]],
    options: TsvmParameters,
    reports: Sequence[TensorReport],
) -> list[TsvMerge]:
    """Merge the task matrices of each layer with the weights of its report; add to it what was found.

    That is ranks, energies, interference, certificate, and an equal share of the time.
    """
    first = layers[0][0]
    solver = solver_for(options, (first.left if isinstance(first, Factored) else first).device.type)
    spent: dict[str, list[float]] = {}
    with timed(spent, "spectral"):
        found = tsv_merge_layers(
            layers,
            ranks,
            [report.weights for report in reports],
            mode=options.mode,
            solver=solver,
            workspace=options.workspace,
        )
    for merged, matrices, report in zip(found, layers, reports, strict=True):
        report.stages["spectral"] = [seconds / len(layers) for seconds in spent["spectral"]]
        _add_measures(report, merged, matrices[0].shape, solver)
    return found


def summands_of_tsvm(
    matrices: Sequence[Tensor | Factored], ranks: Sequence[Rank], options: TsvmParameters, report: TensorReport
) -> Summands:
    """Return the summands of a TSV-Merge, times the weights of the report; add to it what was found."""
    first = matrices[0]
    solver = solver_for(options, (first.left if isinstance(first, Factored) else first).device.type)
    with timed(report.stages, "spectral"):
        found = tsv_parts(matrices, ranks, mode=options.mode, solver=solver, workspace=options.workspace)
    _add_measures(report, found, first.shape, solver)
    parts = [replace(part, scale=weight) for part, weight in zip(found.parts, report.weights, strict=True)]
    largest = max(map(abs, report.weights), default=1.0)
    return Summands([*parts], report, found.certificate.error * largest * total_norm(found.parts))


def _add_measures(report: TensorReport, found: TsvMerge | TsvParts, shape: Sequence[int], solver: Solver) -> None:
    """Add to a report ranks, energies, interference and the certificate."""
    report.ranks, report.captured_energy = list(found.ranks), list(found.captured_energy)
    report.certificate, report.solver = found.certificate, solver
    sides = zip(found.interference, shape, strict=True)
    above = [interference_above_chance(overlap, found.ranks, size) for overlap, size in sides]
    report.interference = [value for value in above if value is not None]
