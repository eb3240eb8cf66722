"""Weighted orthogonalisation, damping and retention: step 6 of the formulas at the top of rtsvm.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from ..linalg import (
    Factored,
    Rank,
    Solver,
    WeightedMerge,
    WeightedParts,
    factored_gram,
    spectral_norm,
    weighted_merge_layers,
    weighted_parts,
)
from .gram import cosines, gram_matrix
from .reports import Summands, TensorReport, timed, total_norm
from .spectral_costs import solver_for

if TYPE_CHECKING:
    from .rtsvm import RtsvmParameters

# The least that retention counts as retained.
LEAST_RETAINED = 0.25


def task_products(matrices: Sequence[Tensor | Factored]) -> Tensor:
    """Return the products ``<D_s, D_t>`` of all task matrices, (T, T) float64, CPU."""
    factors = [matrix for matrix in matrices if isinstance(matrix, Factored)]
    if len(factors) == len(matrices):
        return factored_gram(factors).cpu()
    return gram_matrix([matrix.dense() if isinstance(matrix, Factored) else matrix for matrix in matrices])


def damping_factors(
    gram: Tensor, base: Tensor, matrices: Sequence[Tensor | Factored], damping: float, workspace: int
) -> list[float]:
    """Return ``g_t = 1 / (1 + c delta rho_t^2)``, 1 for a zero task matrix.

    ``rho_t = norm_2(D_t) / max(norm_2(W_0), max_s norm_2(D_s))`` is the size of an update relative to the base, and
    ``delta = 1 - norm(mean D)^2 / mean norm(D)^2`` how much the tasks disagree, 0 if they are equal. Both are over the
    tasks that are not zero.

    Args:
        gram: (T, T) the products of the task matrices.
        base: (m, n) W_0.
        matrices: T task matrices (m, n).
        damping: c >= 0.
        workspace: bytes for copies of matrix rows.
    """
    squares = gram.diagonal()
    live = int((squares > 0).sum())
    if not damping or live < 2:
        return [1.0] * len(matrices)
    disagreement = max(0.0, 1 - float(gram.sum() / live / squares.sum()))
    norms = [spectral_norm(matrix, workspace=workspace) for matrix in matrices]
    largest = max(spectral_norm(base, workspace=workspace), *norms)
    return [1 / (1 + damping * disagreement * (norm / largest) ** 2) for norm in norms]


def retention_exponent(gram: Tensor, retention: float | str) -> float:
    """Return p: `retention`, or ``(1 - c)^4 / 2`` for ``auto``, with the mean cosine c >= 0 of the tasks.

    Task matrices of zeros do not count.

    Examples:
        >>> retention_exponent(torch.eye(3), "auto"), retention_exponent(torch.ones(2, 2), "auto")
        (0.5, 0.0)
    """
    if not isinstance(retention, str):
        return retention
    live = gram.diagonal() > 0
    pairs = cosines(gram[live][:, live])
    tasks = len(pairs)
    if tasks < 2:
        return 0.0
    mean = float((pairs.sum() - tasks) / (tasks * (tasks - 1)))
    return (1 - max(0.0, mean)) ** 4 / 2


def merge_weighted_and_report(
    bases: Sequence[Tensor],
    layers: Sequence[Sequence[Tensor | Factored]],
    ranks: Sequence[Sequence[Rank]],
    options: RtsvmParameters,
    reports: Sequence[TensorReport],
) -> list[Tensor]:
    """Return ``kappa * sum(w_t g_t M_t)`` of each layer with the weights of its report; add to it what was measured.

    Args:
        bases: L matrices (m, n), W_0 of each layer.
        layers: of each, T task matrices (m, n), after reweighting and pruning.
        ranks: largest ranks of each.
        options: of the method.
        reports: of each; the weights are those of the tasks.
    """
    solver = solver_for(options, bases[0].device.type)
    spent: dict[str, list[float]] = {}
    with timed(spent, "spectral"):
        grams = [task_products(matrices) for matrices in layers]
        for base, matrices, gram, report in zip(bases, layers, grams, reports, strict=True):
            report.damping = damping_factors(gram, base, matrices, options.damping, options.workspace)
        found = weighted_merge_layers(
            layers,
            [[w * g for w, g in zip(report.weights, report.damping, strict=True)] for report in reports],
            power=options.orthogonalization_power,
            ranks=[None if set(own) == {min(base.shape)} else own for base, own in zip(bases, ranks, strict=True)],
            mode=options.mode,
            solver=solver,
            workspace=options.workspace,
        )
    updates = []
    for merged, gram, report in zip(found, grams, reports, strict=True):
        gain = _add_measures(report, merged, gram, options, solver)
        report.stages["spectral"] = [seconds / len(layers) for seconds in spent["spectral"]]
        updates.append(merged.matrix * gain if gain != 1 else merged.matrix)
    return updates


def summands_of_weighted(
    base: Tensor,
    matrices: Sequence[Tensor | Factored],
    ranks: Sequence[Rank],
    options: RtsvmParameters,
    report: TensorReport,
) -> Summands:
    """Return ``kappa w_t g_t M_t`` with the weights of the report; add to it what was measured.

    Args:
        base: (m, n) W_0.
        matrices: T task matrices (m, n), after reweighting and pruning.
        ranks: their largest ranks.
        options: of the method.
        report: its weights are those of the tasks.
    """
    solver = solver_for(options, base.device.type)
    with timed(report.stages, "spectral"):
        gram = task_products(matrices)
        report.damping = damping_factors(gram, base, matrices, options.damping, options.workspace)
        found = weighted_parts(
            matrices,
            power=options.orthogonalization_power,
            ranks=None if set(ranks) == {min(base.shape)} else ranks,
            mode=options.mode,
            solver=solver,
            workspace=options.workspace,
        )
    gain = _add_measures(report, found, gram, options, solver)
    factors = [gain * w * g for w, g in zip(report.weights, report.damping, strict=True)]
    parts = [
        replace(part, scale=factor) if isinstance(part, Factored) else part * factor
        for part, factor in zip(found.parts, factors, strict=True)
    ]
    largest = max(map(abs, factors), default=1.0)
    return Summands(parts, report, found.certificate.error * largest * total_norm(found.parts))


def _add_measures(
    report: TensorReport, found: WeightedMerge | WeightedParts, gram: Tensor, options: RtsvmParameters, solver: Solver
) -> float:
    """Add to a report ranks, the certificate and what is retained; return kappa."""
    live = [share for share, square in zip(found.retained, gram.diagonal().tolist(), strict=True) if square]
    retained = min(max(sum(live) / len(live), LEAST_RETAINED), 1.0) if live else 1.0
    gain: float = retained ** -retention_exponent(gram, options.retention)
    report.retained, report.gain = list(found.retained), gain
    report.ranks, report.certificate, report.solver = list(found.ranks), found.certificate, solver
    return gain
