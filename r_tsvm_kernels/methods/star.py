"""STAR: each task matrix cut to its leading singular directions, its nuclear norm restored, then the average."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from ..linalg import Factored, Mode, leading_subspaces, leading_triplets, touched
from ..ops import add_update
from .base import Cost, FiniteFloat, Job, MergeResult, MethodParameters, TensorReport, always, register, task_matrices


class StarParameters(MethodParameters):
    """Parameters of `star`."""

    eta: float = Field(default=40.0, gt=0, le=100, description="percentage of each nuclear norm that is kept")
    alpha: FiniteFloat = Field(default=1.0, alias="lambda", description="scale of the merged task vector")
    mode: Mode = Field(default="exact", description="exact (1e-4 of float64) or fast (1e-2)")
    exclude_keys: list[str] = Field(
        default=[], description="names (or patterns with *) of matrices that get the mean task vector instead"
    )


def star_cost(job: Job, options: StarParameters) -> Cost:
    """Return what `star` takes: the task matrices, and the leading subspaces of one after the other."""
    short, elements = min(job.shape), job.elements
    flops = job.tasks * (8.0 * short * elements + 9.0 * short**3)
    return Cost(job.tasks * job.itemsize * elements + 8 * (9 * elements + 16 * short**2), flops)


@register(
    "star",
    pretty_name="STAR",
    paper_url="https://arxiv.org/abs/2502.10339",
    parameters=StarParameters,
    aliases=("star_merging",),
    matrices_only=True,
    factored=always,
    cost=star_cost,
)
def star(base: Tensor, tuned: Sequence[Tensor | Factored], options: StarParameters) -> MergeResult:
    """Return ``W_0 + alpha * mean(w_t D'_t)``, with ``D'_t`` the truncated and rescaled task matrix.

    ``D'_t = (sum(s) / sum(s[:k])) U_k diag(s_k) V_k^T`` with the smallest k for which the leading singular values hold
    `eta` percent of the nuclear norm ``sum(s)``; so ``D'_t`` has the nuclear norm of ``D_t`` (Lee et al., NAACL 2025,
    sections 3.1 and 3.2).
    """
    total = torch.zeros_like(base, dtype=torch.float64)
    report = TensorReport(weights=list(options.weight))
    matrices, dtype = task_matrices(base, tuned)
    for weight, matrix in zip(options.weight, matrices, strict=True):
        rule = _NuclearRank(options.eta / 100)
        if isinstance(matrix, Factored):
            U, values, Vh, energy = leading_triplets(matrix, rule)
            total.addmm_(U * values, Vh, alpha=weight / len(tuned) * rule.rescale)
            rank = len(values)
        else:
            rows, columns = touched([matrix])
            (part,) = leading_subspaces([matrix[rows[:, None], columns]], [rule], options.mode)
            update = (part.U @ part.core) @ part.Vh
            total[rows[:, None], columns] += update.mul_(weight / len(tuned) * rule.rescale)
            rank, energy = part.rank, part.captured_energy
            if report.certificate is None or part.certificate.error > report.certificate.error:
                report.certificate = part.certificate
        report.ranks.append(rank)
        report.captured_energy.append(energy)
    return MergeResult(add_update(base, total.to(dtype), options.alpha), report)


class _NuclearRank:
    """The rank that holds a share of the nuclear norm; `rescale` is the nuclear norm over what that rank holds."""

    def __init__(self, share: float) -> None:
        self.share = share
        self.rescale = 1.0

    def __call__(self, singular_values: Tensor) -> int:
        # Roots of eigenvalues of a Gram matrix know no smaller ones, and there may be thousands of those.
        noise = (len(singular_values) * torch.finfo(torch.float64).eps) ** 0.5 * singular_values[0]
        sums = torch.where(singular_values > noise, singular_values, 0).cumsum(0)
        rank = int((sums < self.share * sums[-1]).sum()) + 1
        self.rescale = float(sums[-1] / sums[rank - 1]) if sums[-1] > 0 else 1.0
        return rank
