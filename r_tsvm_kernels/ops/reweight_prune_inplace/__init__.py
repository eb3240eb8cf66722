"""Outlier clipping and magnitude pruning of task vectors in their own memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import dispatch
from ...errors import ConfigError, DTypeError
from .._checks import check_apart, check_group
from ..reweight_prune import OutlierWeighting, check_weighting, kept_counts
from ..task_statistics import TaskStatistics


def reweight_prune_(
    deltas: Sequence[Tensor],
    statistics: TaskStatistics,
    outlier_weighting: OutlierWeighting = "clip",
    density: Sequence[float] | float = 1.0,
    *,
    backend: str | None = None,
) -> list[Tensor]:
    """Clip and prune task vectors that are there already, in place.

    Bit for bit what `reweight_prune` makes of them as the fine-tuned tensors of a base of zeros.

    Args:
        deltas: T task vectors of the same shape, dtype and device, float32 or float64, contiguous, none of which
            overlaps another one in memory or requires grad. They are overwritten; if an error is raised they are left
            as they were.
        statistics: of these task vectors, from `task_statistics`.
        outlier_weighting: ``clip``, ``damp``, ``boost`` or ``none``, see `reweight_prune`.
        density: fraction kept, in [0, 1], one number or one per task.
        backend: run this implementation or raise; None takes the fastest one that is available.

    Returns:
        The tensors of `deltas`.

    Raises:
        ShapeError, DTypeError, DeviceError: the task vectors do not match, or are not float32 or float64.
        ConfigError: an unknown mode, statistics of another number of tasks, a density out of range or of the wrong
            number, a task vector that is not contiguous, overlaps another one or requires grad.
        NonFiniteError: a task vector that must be pruned holds NaN or infinity.
        BackendUnavailableError: `backend` cannot run here.
    """
    check_group(deltas[0] if deltas else torch.empty(0), deltas, op="reweight_prune_")
    dtype = deltas[0].dtype
    for index, delta in enumerate(deltas):
        if delta.dtype != dtype or dtype not in (torch.float32, torch.float64):
            raise DTypeError(
                f"reweight_prune_: expected all float32 or all float64, got {dtype} and deltas[{index}] {delta.dtype}"
            )
        if not delta.is_contiguous() or delta.is_neg():
            raise ConfigError(f"reweight_prune_: deltas[{index}] is not contiguous; make it so with .contiguous()")
        if delta.requires_grad:
            raise ConfigError(f"reweight_prune_: deltas[{index}] requires grad; give delta.detach()")
    check_apart({f"deltas[{index}]": delta for index, delta in enumerate(deltas)}, op="reweight_prune_")
    check_weighting(outlier_weighting, statistics, len(deltas))
    keep = kept_counts(density, len(deltas), deltas[0].numel(), op="reweight_prune_")
    run = dispatch.select("reweight_prune_inplace", *deltas, backend=backend)
    run(deltas, statistics, outlier_weighting, keep)
    torch.autograd.graph.increment_version(deltas)  # kernels write behind torch's back
    return list(deltas)
