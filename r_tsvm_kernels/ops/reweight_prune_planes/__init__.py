"""Outlier clipping and magnitude pruning, straight into the operand format of the products on tensor cores."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import dispatch
from ...errors import DTypeError, ShapeError
from .._checks import check_group
from .._planes import Planes
from ..reweight_prune import OutlierWeighting, check_weighting, kept_counts
from ..split_planes import scale_above
from ..task_statistics import TaskStatistics


def reweight_prune_planes(
    base: Tensor,
    tuned: Sequence[Tensor],
    statistics: TaskStatistics,
    outlier_weighting: OutlierWeighting = "clip",
    density: Sequence[float] | float = 1.0,
    *,
    backend: str | None = None,
) -> Planes:
    """Return ``split_planes(stack(reweight_prune(...)))``, bit for bit, without storing the float32 matrices.

    The scales need no pass over the data: the largest magnitude always survives, and `statistics` knows it.

    Args:
        base: (m, n) float32, float16 or bfloat16.
        tuned: T tensors of the same shape and device.
        statistics: of these tensors, from `task_statistics`.
        outlier_weighting: ``clip``, ``damp``, ``boost`` or ``none``.
        density: fraction kept, in [0, 1], one number or one per task.
        backend: run this implementation or raise; None takes the fastest one that is available.

    Returns:
        Planes of shape (T, m, n).

    Raises:
        ShapeError, DeviceError: the tensors do not match or are not matrices.
        DTypeError: a tensor is not floating point, or float64, which two fp16 planes cannot hold.
        ConfigError: an unknown mode, or a density out of range or of the wrong number.
        NonFiniteError: a task vector that must be pruned holds NaN or infinity.
        BackendUnavailableError: `backend` cannot run here.
    """
    check_group(base, tuned, op="reweight_prune_planes")
    if base.ndim != 2:
        raise ShapeError(f"reweight_prune_planes: expected matrices, got shape {tuple(base.shape)}")
    if any(tensor.dtype == torch.float64 for tensor in (base, *tuned)):
        raise DTypeError("reweight_prune_planes: planes hold 22 bits, not float64; use reweight_prune")
    check_weighting(outlier_weighting, statistics, len(tuned))
    keep = kept_counts(density, len(tuned), base.numel(), op="reweight_prune_planes")
    largest = statistics.max
    if outlier_weighting == "clip":
        largest = torch.minimum(largest, statistics.theta)
    largest = torch.where(torch.tensor([count > 0 for count in keep], device=largest.device), largest, 0.0)
    run = dispatch.select("reweight_prune_planes", base, *tuned, backend=backend)
    planes: Planes = run(base, tuned, statistics, outlier_weighting, keep, scale_above(largest.float()))
    return planes
