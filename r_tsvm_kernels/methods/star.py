"""STAR: cut each task matrix to its leading singular directions, restore its nuclear norm, average.

With the singular values s of ``D_t = W_t - W_0`` and the smallest k whose leading values hold `eta` percent of the
nuclear norm ``sum(s)``::

    W = W_0 + alpha / T * sum_t(w_t D'_t),   D'_t = sum(s) / sum(s[:k]) * U_k diag(s[:k]) V_k^T

Source: Lee et al., "STAR: Spectral Truncation and Rescale for Model Merging", NAACL 2025, sections 3.1 and 3.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from ..linalg import Certificate, Factored, Mode, Rank, leading_subspaces, leading_triplets, nonzero_support
from ..linalg.decompositions import frobenius_norm
from ..linalg.leading_right_vectors import EXACT
from ..ops import add_update
from .base import SPECTRAL_OPS, Cost, FiniteFloat, Linear, MethodParameters, TensorJob, always, register, task_matrices
from .reports import MergeResult, Summands, TensorReport

# Largest error of the nuclear norm, as a share of the tolerance; above it all singular values come from an SVD. The
# square roots of thousands of eigenvalues that are zero up to rounding add up.
NUCLEAR_SHARE = 0.1


class StarParameters(MethodParameters):
    """Parameters of `star`."""

    eta: float = Field(default=40.0, gt=0, le=100, description="percentage of each nuclear norm that is kept")
    alpha: FiniteFloat = Field(default=1.0, alias="lambda", description="scale of the merged task vector")
    mode: Mode = Field(default="exact", description="exact (1e-4 of float64) or fast (1e-2)")
    exclude_keys: list[str] = Field(
        default=[], description="names (or patterns with *) of matrices that get the mean task vector instead"
    )


def star_cost(job: TensorJob, options: StarParameters) -> Cost:
    """Return the cost of `star`: the task matrices, and the leading subspaces of each in turn."""
    short, elements = min(job.shape), job.elements
    flops = job.tasks * (8.0 * short * elements + 9.0 * short**3)
    return Cost(job.tasks * job.itemsize * elements + 8 * (9 * elements + 16 * short**2), flops)


def star_summands(base: Tensor, tuned: Sequence[Tensor | Factored], options: StarParameters) -> Summands:
    """Return ``D'_t / T`` of each task: see the top of this module."""
    matrices, dtype = task_matrices(base, tuned)
    parts, certificates, report = list[Tensor | Factored](), [], TensorReport(weights=list(options.weight))
    error = 0.0
    for matrix in matrices:
        rule, share = _nuclear_rank(options.eta / 100), 1 / len(matrices)
        if isinstance(matrix, Factored):
            left, right, part = _cut_factored(matrix, rule, share)
            parts.append(Factored(left, right))
        else:
            total = torch.zeros(matrix.shape, dtype=torch.float64, device=matrix.device)
            part = _add_dense(total, matrix, rule, share, options.mode, None)
            parts.append(total.to(dtype))
        report.ranks.append(part.rank)
        report.captured_energy.append(part.captured_energy)
        certificates.append(part.certificate)
        error += part.certificate.error * part.norm
    report.certificate = Certificate.worst(certificates).rounded(dtype)
    report.certificate.require()
    return Summands(parts, report, error)


def star_ranks(job: TensorJob, options: StarParameters, factored: Sequence[int]) -> list[int] | None:
    """Return upper bounds of the ranks of the summands: the share of the nuclear norm decides."""
    return list(factored) or None


@register(
    "star",
    pretty_name="STAR",
    paper_url="https://arxiv.org/abs/2502.10339",
    parameters=StarParameters,
    rounds=True,
    ops=SPECTRAL_OPS,
    aliases=("star_merging",),
    matrices_only=True,
    factored=always,
    cost=star_cost,
    linear=Linear(star_summands, ranks=star_ranks),
)
def star(
    base: Tensor, tuned: Sequence[Tensor | Factored], options: StarParameters, out_dtype: torch.dtype | None = None
) -> MergeResult:
    """Merge by STAR: the formula at the top of this module.

    Examples:
        >>> base = torch.zeros(30, 20)
        >>> tuned = [base + torch.randn(30, 20, generator=torch.Generator().manual_seed(t)) for t in range(2)]
        >>> star(base, tuned, StarParameters(weight=[1.0] * 2, eta=50)).report.ranks
        [7, 7]
    """
    matrices, dtype = task_matrices(base, tuned)
    total, certificate, report = _sum_truncated(matrices, options, None)
    if not certificate.rounded(dtype).met:  # tasks cancel each other; the small sum must be accurate, too
        total, certificate, report = _sum_truncated(matrices, options, EXACT)
    report.certificate = certificate.rounded(dtype)
    report.certificate.require()
    return MergeResult(add_update(base, total.to(dtype), options.alpha, out_dtype=out_dtype), report)


def _sum_truncated(
    matrices: Sequence[Tensor | Factored], options: StarParameters, routes: Sequence[str] | None
) -> tuple[Tensor, Certificate, TensorReport]:
    """Return the mean of the weighted ``D'_t``, float64, its certificate, and the rest of the report."""
    first = matrices[0]
    device = first.left.device if isinstance(first, Factored) else first.device
    total = torch.zeros(first.shape, dtype=torch.float64, device=device)
    report = TensorReport(weights=list(options.weight))
    certificates, norms = [], []
    for weight, matrix in zip(options.weight, matrices, strict=True):
        rule = _nuclear_rank(options.eta / 100)
        if isinstance(matrix, Factored):
            part = _add_factored(total, matrix, rule, weight / len(matrices))
        else:
            part = _add_dense(total, matrix, rule, weight / len(matrices), options.mode, routes)
        report.ranks.append(part.rank)
        report.captured_energy.append(part.captured_energy)
        certificates.append(part.certificate)
        norms.append(part.norm)
    return total, Certificate.of_sum(certificates, norms, total), report


class _Part(NamedTuple):
    rank: int
    captured_energy: float
    norm: float  # of what was added
    certificate: Certificate  # of it


def _add_factored(total: Tensor, matrix: Factored, rule: Rank, weight: float) -> _Part:
    left, right, part = _cut_factored(matrix, rule, weight)
    total.addmm_(left, right)
    return part


def _cut_factored(matrix: Factored, rule: Rank, weight: float) -> tuple[Tensor, Tensor, _Part]:
    """Return the weighted ``D'_t`` as two factors, and what is known of it."""
    found = leading_triplets(matrix, rule)
    rescale = float(found.cut.values.sum() / found.S.sum()) if len(found.S) else 1.0
    norm = abs(weight) * rescale * frobenius_norm(found.S)
    part = _Part(len(found.S), found.captured_energy, norm, found.certificate)
    return found.U * (found.S * (weight * rescale)), found.Vh, part


def _add_dense(
    total: Tensor, matrix: Tensor, rule: Rank, weight: float, mode: Mode, routes: Sequence[str] | None
) -> _Part:
    rows, columns = nonzero_support([matrix])
    core = matrix[rows[:, None], columns]
    part = leading_subspaces(core, rule, mode=mode, routes=routes)
    if part.value_error > NUCLEAR_SHARE * part.certificate.tolerance:
        part = leading_subspaces(core, rule, mode=mode, routes=EXACT)
    kept = part.cut.values[: part.rank].sum()
    rescale = float(part.nuclear_norm / kept) if part.rank else 1.0
    total[rows[:, None], columns] += ((part.U @ part.core) @ part.Vh).mul_(weight * rescale)
    norm = abs(weight) * rescale * frobenius_norm(part.core)
    certificate = replace(part.certificate, error=part.certificate.error + 2 * part.value_error)
    return _Part(part.rank, part.captured_energy, norm, certificate)


def _nuclear_rank(share: float) -> Rank:
    """Return the rank rule for a share of the nuclear norm: the smallest rank that holds it."""

    def rank(singular_values: Tensor) -> int:
        sums = singular_values.cumsum(0)
        return int((sums < share * sums[-1]).sum()) + 1

    return rank
