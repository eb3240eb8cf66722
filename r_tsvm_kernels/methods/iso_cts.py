"""Iso-CTS: Iso-C in a subspace that all tasks share, joined by directions of the single tasks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from ..errors import ConvergenceError
from ..linalg import Certificate, Mode, polar, truncated_svd
from ..linalg.decompositions import svd
from ..ops import accumulation_dtype, add_update
from .base import Cost, Job, MergeResult, TensorReport, register, timed
from .iso_c import IsoCParameters, sum_of_tasks


class IsoCtsParameters(IsoCParameters):
    """Parameters of `iso_cts`."""

    common_space_fraction: float = Field(default=0.8, ge=0, le=1, description="share of the common subspace")


def iso_cts_cost(job: Job, options: IsoCtsParameters) -> Cost:
    """Return what `iso_cts` takes: the leading subspaces of the sum and of each task, and two polar factors."""
    short, elements = min(job.shape), job.elements
    flops = (job.tasks + 1) * (6.0 * short * elements + 9.0 * short**3)
    return Cost(8 * (14 * elements + 24 * short**2), flops)


def common_and_own_ranks(short: int, tasks: int, fraction: float) -> tuple[int, int]:
    """Share the rank `short` out: common directions, and own ones of each task, as many for all; none is left over."""
    own = round((short - int(short * fraction)) / tasks)
    own = min(own, short // tasks)  # rounding up may ask for more than there is
    return short - own * tasks, own


@register(
    "iso_cts",
    pretty_name="Iso-CTS",
    paper_url="https://arxiv.org/abs/2502.04959",
    parameters=IsoCtsParameters,
    matrices_only=True,
    cost=iso_cts_cost,
)
def iso_cts(base: Tensor, tuned: Sequence[Tensor], options: IsoCtsParameters) -> MergeResult:
    """As `iso_c`, but the last directions of the sum make room for directions of the single tasks.

    Singular vectors of the sum, then of what each task has outside their left subspace, are put side by side and
    orthogonalised; all get the mean of their singular values (Marczak et al., ICML 2025).
    """
    total, rows, columns = sum_of_tasks(base, tuned, options.weight)
    core = total[rows][:, columns]

    def parts(exact: bool) -> Iterator[_Triplets]:
        common_rank, own_rank = common_and_own_ranks(min(base.shape), len(tuned), options.common_space_fraction)
        common = _triplets(core, core, common_rank, options.mode, exact)
        yield common
        for weight, tensor in zip(options.weight, tuned, strict=True):
            delta = ((tensor.double() - base.double()) * weight)[rows][:, columns]
            rest = delta - common.U @ (common.U.mT @ delta)
            yield _triplets(rest, delta, own_rank, options.mode, exact)

    report = TensorReport(weights=list(options.weight))
    with timed(report.stages, "spectral"):
        try:
            joined = _join(list(parts(exact=False)), options.mode)
        except ConvergenceError as failure:
            joined = _join(list(parts(exact=True)), options.mode, (str(failure),))
    left, right, values, report.certificate = joined
    mean = float(values.sum()) / min(base.shape)
    total[rows.unsqueeze(1), columns] = mean * (left @ right.mT)
    merged = add_update(base, total.to(accumulation_dtype(base, *tuned)), options.alpha)
    return MergeResult(merged, report)


class _Triplets(NamedTuple):
    U: Tensor  # (m, k)
    S: Tensor  # (k,)
    V: Tensor  # (n, k)
    certificate: Certificate | None  # None for the SVD of LAPACK, the definition of exact


def _triplets(matrix: Tensor, whole: Tensor, rank: int, mode: Mode, exact: bool) -> _Triplets:
    """Return leading singular triplets, without those that are rounding of the matrix this one is a part of."""
    if exact:
        U, values, Vh = svd(matrix)
        certificate = None
    else:
        found = truncated_svd([matrix], [rank], mode)
        U, values, Vh, certificate = found.U[0], found.S[0], found.Vh[0], found.certificates[0]
    noise = torch.finfo(torch.float32).eps * float(torch.linalg.vector_norm(whole))
    k = min(rank, int((values > noise).sum()))
    return _Triplets(U[:, :k], values[:k], Vh[:k].mT, certificate)


def _join(
    parts: Sequence[_Triplets], mode: Mode, escalations: tuple[str, ...] = ()
) -> tuple[Tensor, Tensor, Tensor, Certificate]:
    """Orthogonalise both sides; return them, the singular values, and the certificate.

    Raises:
        ConvergenceError: the polar factors amplify the error of the subspaces too much.
    """
    left, right = polar([torch.cat([part.U for part in parts], 1), torch.cat([part.V for part in parts], 1)], mode)
    subspace_error = max([part.certificate.error for part in parts if part.certificate is not None], default=0.0)
    orthogonality = max(left.certificate.orthogonality, right.certificate.orthogonality)
    certificate = Certificate(
        error=subspace_error * max(left.condition, right.condition) + orthogonality,
        orthogonality=orthogonality,
        subspace_error=subspace_error,
        tolerance=left.certificate.tolerance,
        route=parts[0].certificate.route if parts[0].certificate else "svd-float64",
        basis_rank=(left.rank, right.rank),
        basis_condition=(left.condition, right.condition),
        escalations=escalations,
    )
    certificate.require()
    return left.matrix, right.matrix, torch.cat([part.S for part in parts]), certificate
