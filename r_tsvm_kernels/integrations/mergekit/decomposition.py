"""mergekit's LoRA extraction with our truncated SVD."""

from __future__ import annotations

import torch
from mergekit.scripts.extract_lora import TaskVectorDecompositionTask
from torch import Tensor

from ...errors import ConvergenceError
from ...linalg import truncated_svd
from . import INSTALLATION
from .kernels import accepted


def decompose(task: TaskVectorDecompositionTask, /, task_vector: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return the factors A (rank, n) and B (m, rank) of the update; None for inputs that mergekit should handle.

    They have the rank of mergekit's factors. If the rank of the update is smaller, the other rows and columns are zero.
    """
    if task_vector.ndim != 2 or not accepted(task_vector) or not bool(task_vector.isfinite().all()):
        return None
    matrix = task_vector.mT if task.transpose else task_vector
    limit = max(0, min(task.max_rank, *matrix.shape))
    try:
        U, values, Vh = truncated_svd(matrix.float(), limit)
    except ConvergenceError:
        return None
    INSTALLATION.count("truncated_svd")
    rank = limit if task.sv_epsilon <= 0 else int((values > task.sv_epsilon).sum())
    values, A, B = values[:rank], Vh[:rank], U[:, :rank]
    missing = rank - len(values)
    if task.distribute_scale:
        A, B = values.sqrt()[:, None] * A, B * values.sqrt()
    else:
        A = values[:, None] * A
    A = torch.cat([A, A.new_zeros(missing, A.shape[1])])
    B = torch.cat([B, B.new_zeros(B.shape[0], missing)], dim=1)
    return A.to(task_vector.dtype), B.to(task_vector.dtype)
