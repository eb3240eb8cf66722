"""The readings of R-TSVM that need single elements of the task matrices beyond what the kernels of `rtsvm` give.

Formulas, symbols and options are those at the top of `rtsvm`. Everything here is plain torch: sums and comparisons in
float64, task matrices in float32 (float64 if any input is float64).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ..ops import kept_count, magnitude_select
from ..ops._checks import accumulation_dtype
from .base import TensorJob
from .gram import checked

if TYPE_CHECKING:
    from .rtsvm import RtsvmParameters

OutlierWeighting = Literal["clip", "remove", "keep", "damp", "boost", "complement", "none"]
OutlierMeasure = Literal["share", "mass", "count"]
OutlierStatistic = Literal["magnitude", "signed"]
Normalization = Literal["mean", "sum"]
Pruning = Literal["count", "threshold"]
SparsityUnit = Literal["mean", "max", "absolute"]
SparsityScope = Literal["task", "consensus"]

# Smallest measure that counts, as a share of the mean: a task without outliers gets neither no weight nor all of it.
FLOOR = 0.1


@dataclass(frozen=True)
class Prepared:
    """The task matrices after steps 1 to 4 of `rtsvm`, and what was measured; lists have one entry per task.

    Attributes:
        matrices: (m, n), reweighted element by element and pruned.
        sparsities: z_t.
        outlier_masses: share of the total magnitude that outliers hold, whatever measures them for the weights.
        outliers: q_t, the measure of outliers that weights follow.
    """

    matrices: list[Tensor]
    sparsities: list[float]
    outlier_masses: list[float]
    outliers: list[float]


def needs_torch(options: RtsvmParameters) -> bool:
    """Whether these options ask for a reading that only `prepared_in_torch` has."""
    weighted = options.outlier_weighting in ("damp", "boost", "complement")
    return (
        options.outlier_weighting in ("remove", "keep")
        or options.outlier_statistic != "magnitude"
        or (weighted and options.outlier_measure == "count")
        or options.pruning != "count"
        or options.prune_first
        or options.sparsity_relative != "mean"
        or options.sparsity_scope != "task"
    )


def prepared_in_torch(base: Tensor, tuned: Sequence[Tensor], options: RtsvmParameters) -> Prepared:
    """Take steps 1 to 4 of `rtsvm` in any reading.

    Args:
        base: (m, n), float64, float32, float16 or bfloat16.
        tuned: T tensors of the same shape and device.
        options: parameters with one density per task.

    Raises:
        NonFiniteError: squares of the elements overflow float64.
    """
    dtype = accumulation_dtype(base, *tuned)
    matrices, found, smalls = list[Tensor](), list[_Measured](), list[float]()
    agreed: Tensor | None = None
    for tensor, density in zip(tuned, options.density, strict=True):
        D = tensor.to(dtype) - base.to(dtype)
        measured = _measure(D, options)
        if options.prune_first:
            _prune(D, density, measured, options)
            measured = _measure(D, options)
        D = _reweight(D, measured, options)
        if not options.prune_first:
            _prune(D, density, measured, options)
        small = _is_small(D, measured)
        if options.sparsity_scope == "consensus":
            agreed = small if agreed is None else agreed.logical_and_(small)
        smalls.append(_share(small))
        matrices.append(D)
        found.append(measured)
    sparsities = smalls if agreed is None else [_share(agreed)] * len(matrices)
    outliers = [getattr(measured, options.outlier_measure) for measured in found]
    return Prepared(matrices, sparsities, [measured.share for measured in found], outliers)


def prepared_bytes(job: TensorJob) -> int:
    """Return an upper bound of the memory of `prepared_in_torch`: the task matrices, and temporaries of one of them."""
    return ((job.tasks + 1) * job.itemsize + 24) * job.elements


def outlier_weights(
    outliers: Sequence[float],
    outlier_weighting: OutlierWeighting,
    *,
    exponent: float = 1.0,
    normalization: Normalization = "mean",
) -> list[float]:
    """Return one weight per task from the measures q_t of its outliers.

    ``boost``: in proportion to ``max(q_t, 0.1 mean(q))^a``; ``damp``: the same with ``-a``; ``complement``: to
    ``1 - q_t``. All other modes give 1. If all measures are 0 (for ``complement``, 1), the weights are equal. The
    abstract of R-TSVM (arXiv 2502.06876) does not say which tasks get more weight.

    Args:
        outliers: q_t >= 0; for ``complement`` in [0, 1].
        outlier_weighting: one of the modes of `rtsvm`.
        exponent: a > 0.
        normalization: ``mean``: the weights have mean 1; ``sum``: they sum to 1.

    Examples:
        >>> [round(weight, 2) for weight in outlier_weights([0.1, 0.3], "boost")]
        [0.5, 1.5]
        >>> [round(weight, 2) for weight in outlier_weights([0.1, 0.3], "damp")]
        [1.5, 0.5]
    """
    tasks, mean = len(outliers), sum(outliers) / len(outliers)
    if outlier_weighting == "complement":
        raw = [1.0 - q for q in outliers]
    elif outlier_weighting in ("damp", "boost"):
        power = exponent if outlier_weighting == "boost" else -exponent
        logarithms = [power * math.log(max(q, FLOOR * mean)) if mean > 0 else 0.0 for q in outliers]
        raw = [math.exp(logarithm - max(logarithms)) for logarithm in logarithms]  # no power overflows
    else:
        return [1.0] * tasks
    whole, total = tasks if normalization == "mean" else 1, sum(raw)
    return [whole * part / total for part in raw] if total > 0 else [whole / tasks] * tasks


@dataclass(frozen=True)
class _Measured:
    """What step 1 finds in one task matrix.

    Attributes:
        is_outlier: (m, n) mask.
        low, high: values that are no outliers lie between these.
        share, mass, count: of the outliers, see `OutlierMeasure`.
        limit: magnitude up to which an element is small.
    """

    is_outlier: Tensor
    low: float
    high: float
    share: float
    mass: float
    count: float
    limit: float


def _measure(D: Tensor, options: RtsvmParameters) -> _Measured:
    signed = options.outlier_statistic == "signed"
    values = D.double() if signed else D.abs().double()
    mean = values.mean()
    sd = checked((values - mean).square_().mean().sqrt())  # an overflow would hide all outliers
    width = math.inf if math.isinf(options.outlier_sigma) else float(options.outlier_sigma * sd)
    if signed:
        is_outlier = (values - mean).abs_() > width
        low, high = float(mean) - width, float(mean) + width
        values = values.abs()
    else:
        high = float(mean) + width
        low = -high
        is_outlier = values > high
    mass, total = float(values.where(is_outlier, 0.0).sum()), float(values.sum())
    units = {"mean": total / values.numel(), "max": float(values.amax()), "absolute": 1.0}
    limit = options.sparsity_eps * units[options.sparsity_relative]
    return _Measured(is_outlier, low, high, mass / total if total > 0 else 0.0, mass, _share(is_outlier), limit)


def _reweight(D: Tensor, measured: _Measured, options: RtsvmParameters) -> Tensor:
    """Return the matrix after what `outlier_weighting` does to its elements."""
    if options.outlier_weighting == "clip":
        low, high = (torch.tensor(bound, dtype=D.dtype, device=D.device) for bound in (measured.low, measured.high))
        return D.clamp_(low, high)
    if options.outlier_weighting == "remove":
        return D.masked_fill_(measured.is_outlier, 0.0)
    if options.outlier_weighting == "keep":
        return D.masked_fill_(~measured.is_outlier, 0.0)
    return D


def _prune(D: Tensor, density: float, measured: _Measured, options: RtsvmParameters) -> None:
    """Set to 0 what step 3 drops, in place."""
    if options.pruning == "threshold":
        D.masked_fill_(_is_small(D, measured), 0.0)
    elif (count := kept_count(density, D.numel())) < D.numel():
        D.masked_fill_(~magnitude_select(D, count).mask(D), 0.0)


def _is_small(D: Tensor, measured: _Measured) -> Tensor:
    return D.abs().double() <= measured.limit  # torch would compare float32 with the limit rounded to it


def _share(mask: Tensor) -> float:
    return int(mask.sum()) / mask.numel()
