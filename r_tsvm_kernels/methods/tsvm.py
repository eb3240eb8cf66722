"""TSV-Merge: the leading singular vectors of all tasks, made orthogonal to each other.

``D_t = W_t - W_0`` is the task matrix (m, n) of fine-tune t = 1 .. T, and ``k = floor(min(m, n) / T)`` the rank of each
task. U_t and V_t are the k leading left and right singular vectors of D_t, ``H_t = U_t^T D_t V_t``, and polar is the
orthogonal factor of the polar decomposition::

    W = W_0 + alpha * polar([U_1 .. U_T]) blockdiag(w_1 H_1 .. w_T H_T) polar([V_1 .. V_T])^T

Source: Gargiulo et al., "Task Singular Vectors", CVPR 2025, algorithm 1. `linalg.tsv_merge` computes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import BeforeValidator, Field
from torch import Tensor

from ..linalg import (
    Factored,
    Mode,
    Rank,
    Solver,
    TsvMerge,
    fixed_rank,
    interference_above_chance,
    tsv_merge,
)
from ..ops import add_update
from ..sizes import parse_size
from .base import (
    FiniteFloat,
    MergeResult,
    MethodParameters,
    TensorReport,
    always,
    register,
    task_matrices,
    timed,
)
from .spectral_costs import tsvm_cost

# An eighth of the default of `tsv_merge`: measured to be no slower, and it halves the memory of tall matrices. It
# affects how sums are rounded, so it does not depend on the memory budget.
WORKSPACE = 64 << 20


class TsvmParameters(MethodParameters):
    """Parameters of `tsvm`."""

    alpha: FiniteFloat = Field(default=1.0, alias="lambda", description="scale of the merged task vector")
    mode: Mode = Field(default="exact", description="exact (1e-4 of float64) or fast (1e-2)")
    solver: Solver = Field(default="eigen", description="eigen, or products (tensor cores)")
    workspace: Annotated[int, BeforeValidator(parse_size), Field(ge=1)] = Field(
        default=WORKSPACE, description="memory for copies of rows, e.g. 64MB: less is slower and changes the last bits"
    )
    exclude_keys: list[str] = Field(
        default=[], description="names (or patterns with *) of matrices that get the mean task vector instead"
    )


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
    """Merge by TSV-Merge: the formula at the top of this module.

    A matrix with fewer rows or columns than tasks gets rank 0 and keeps the base's value, as in the published code.

    Examples:
        >>> base = torch.zeros(30, 20)
        >>> tuned = [base + torch.randn(30, 20, generator=torch.Generator().manual_seed(t)) for t in range(3)]
        >>> tsvm(base, tuned, TsvmParameters(weight=[1.0] * 3)).report.ranks
        [6, 6, 6]
    """
    ranks = [fixed_rank((base.shape[0], base.shape[1]), len(tuned))] * len(tuned)
    report = TensorReport(weights=list(options.weight), ranks_asked=list(ranks))
    merged = merge_and_report(task_matrices(base, tuned)[0], ranks, options, report)
    return MergeResult(add_update(base, merged.matrix, options.alpha), report)


def merge_and_report(
    matrices: Sequence[Tensor | Factored], ranks: Sequence[Rank], options: TsvmParameters, report: TensorReport
) -> TsvMerge:
    """Merge with the weights of the report; add ranks, energies, interference and certificate to it."""
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
