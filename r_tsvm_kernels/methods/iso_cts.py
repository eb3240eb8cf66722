"""Iso-CTS: Iso-C in a common subspace of all tasks, extended by directions of the single tasks.

1. Common part: the leading ``r_0`` singular triplets ``U_0, s_0, V_0`` of the sum ``sum_t(w_t D_t)``.
2. Own part of each task: the leading ``r_1`` singular triplets ``U_t, s_t, V_t`` of ``w_t D_t - U_0 U_0^T w_t D_t``.
3. With ``r_0 + T r_1 = min(m, n)``, and polar the orthogonal factor of the polar decomposition::

       W = W_0 + alpha * mean(s_0, s_1 .. s_T) * polar([U_0, U_1 .. U_T]) polar([V_0, V_1 .. V_T])^T

Source: Marczak et al., "No Task Left Behind", ICML 2025, algorithm 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from ..errors import ConvergenceError
from ..linalg import BACKWARD_ERROR, Certificate, Cut, Mode, truncated_svd
from ..linalg.certificate import tolerance_of
from ..linalg.decompositions import frobenius_norm, svd
from ..linalg.leading_right_vectors import ROUTES
from ..linalg.merge_accuracy import PolarPair, WeightedCores, polar_pair
from ..linalg.parallel import run_concurrently
from ..ops import add_update
from ..ops._checks import accumulation_dtype
from .base import SPECTRAL_OPS, Cost, TensorJob, always, register
from .iso_c import IsoCParameters, sum_of_tasks
from .reports import MergeResult, TensorReport, timed


class IsoCtsParameters(IsoCParameters):
    """Parameters of `iso_cts`."""

    common_space_fraction: float = Field(default=0.8, ge=0, le=1, description="share of the common subspace")


def iso_cts_cost(job: TensorJob, options: IsoCtsParameters) -> Cost:
    """Return the cost of `iso_cts`: the leading subspaces of the sum and of each task, and two polar factors."""
    short, elements = min(job.shape), job.elements
    flops = (job.tasks + 1) * (6.0 * short * elements + 9.0 * short**3)
    return Cost(8 * (14 * elements + 24 * short**2), flops)


def common_and_own_ranks(short: int, tasks: int, fraction: float) -> tuple[int, int]:
    """Return ``r_0`` and ``r_1``: the common directions and the own ones of each task share out the rank `short`."""
    own = round((short - int(short * fraction)) / tasks)
    own = min(own, short // tasks)  # rounding up may exceed the total
    return short - own * tasks, own


@register(
    "iso_cts",
    pretty_name="Iso-CTS",
    paper_url="https://arxiv.org/abs/2502.04959",
    parameters=IsoCtsParameters,
    rounds=True,
    ops=SPECTRAL_OPS,
    matrices_only=True,
    isotropic=always,
    cost=iso_cts_cost,
)
def iso_cts(
    base: Tensor, tuned: Sequence[Tensor], options: IsoCtsParameters, out_dtype: torch.dtype | None = None
) -> MergeResult:
    """Merge by Iso-CTS: the steps at the top of this module.

    Examples:
        >>> base = torch.zeros(30, 20)
        >>> tuned = [base + torch.randn(30, 20, generator=torch.Generator().manual_seed(t)) for t in range(2)]
        >>> merged = iso_cts(base, tuned, IsoCtsParameters(weight=[1.0] * 2)).weight
        >>> bool((torch.linalg.svdvals(merged).std() < 1e-5))
        True
    """
    total, rows, columns, rounding = sum_of_tasks(base, tuned, options.weight)
    core = total[rows][:, columns]
    size = frobenius_norm(core)

    def find_parts(exact: bool) -> list[_Triplets]:
        common_rank, own_rank = common_and_own_ranks(min(base.shape), len(tuned), options.common_space_fraction)
        common = _find_triplets(core, size, common_rank, options.mode, exact, rounding / size if size else 0.0)
        turned, _ = common.cut.error(left=True)

        def find_own(weight: float, tensor: Tensor) -> _Triplets:
            delta = ((tensor.double() - base.double()) * weight)[rows][:, columns]
            whole = frobenius_norm(delta)
            delta -= common.U @ (common.U.mT @ delta)
            return _find_triplets(delta, whole, own_rank, options.mode, exact, turned)

        jobs = [partial(find_own, *task) for task in zip(options.weight, tuned, strict=True)]
        return [common, *run_concurrently(jobs, min(core.shape), core.device)]

    dtype = accumulation_dtype(base, *tuned)
    report = TensorReport(weights=list(options.weight))
    with timed(report.stages, "spectral"):
        try:
            bases, values = _join(find_parts(exact=False), options.mode, dtype, exact=False)
        except ConvergenceError as failure:
            bases, values = _join(find_parts(exact=True), options.mode, dtype, exact=True, escalations=(str(failure),))
    report.certificate = bases.certificate
    mean = float(values.sum()) / min(base.shape)
    total[rows.unsqueeze(1), columns] = mean * (bases.left @ bases.right.mT)
    return MergeResult(add_update(base, total.to(dtype), options.alpha, out_dtype=out_dtype), report)


class _Triplets(NamedTuple):
    U: Tensor  # (m, k)
    S: Tensor  # (k,)
    V: Tensor  # (n, k)
    cut: Cut
    certificate: Certificate | None  # None for the SVD of LAPACK, the definition of exact


def _find_triplets(matrix: Tensor, size: float, rank: int, mode: Mode, exact: bool, turned: float) -> _Triplets:
    """Return leading singular triplets of a matrix, without those that are rounding of the whole that it is a part of.

    Args:
        matrix: a part of the sum or of a task matrix, or all of it.
        size: norm of that whole.
        rank: number of triplets.
        mode: ``exact`` or ``fast``.
        exact: whether LAPACK's SVD computes them.
        turned: sine of the angle by which the part may be rotated.
    """
    if exact:
        U, values, Vh = svd(matrix)
        cut, certificate = Cut(values, rank), None
    else:
        U, values, Vh = found = truncated_svd(matrix, rank, mode=mode)
        (cut,), certificate = found.cuts, found.certificate
    noise = torch.finfo(torch.float32).eps * size
    k = min(rank, int((values > noise).sum()))
    largest = float(cut.values[0]) if len(cut.values) else 0.0
    uncertain = (BACKWARD_ERROR + turned) * size
    edge = k < rank and bool(((cut.values - noise).abs() <= uncertain).any())
    more = turned * size / largest if largest else 0.0
    cut = replace(cut, rank=k, spread=cut.spread + more, inherent=more if exact else 0.0, edge=cut.edge or edge)
    return _Triplets(U[:, :k], values[:k], Vh[:k].mT, cut, certificate)


def _join(
    parts: Sequence[_Triplets],
    mode: Mode,
    dtype: torch.dtype,
    *,
    exact: bool,
    escalations: tuple[str, ...] = (),
) -> tuple[PolarPair, Tensor]:
    """Orthogonalise both sides; return their polar factors, with the certificate, and the singular values.

    Raises:
        ConvergenceError: the polar factors amplify the error of the subspaces too much.
    """
    routes = [part.certificate.route for part in parts if part.certificate is not None]
    bases = polar_pair(
        [part.U for part in parts],
        [part.V for part in parts],
        [part.cut for part in parts],
        WeightedCores([torch.ones_like(part.S) for part in parts], [1.0] * len(parts)),
        tolerance=tolerance_of(mode),
        route=min(routes, key=ROUTES.index) if routes else ROUTES[-1],
        rounding=torch.finfo(dtype).eps,
        exact=exact or set(routes) == {ROUTES[-1]},
        escalations=escalations,
    )
    return bases, torch.cat([part.S for part in parts])
