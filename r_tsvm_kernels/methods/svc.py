"""Singular Value Calibration: scale each singular direction of a merged update by how much it over-counts the tasks.

With the change of the base by a merge, ``Delta = W - W_0 = U S V^T``, the task matrices ``D_t = W_t - W_0``, and their
responses ``a_r = u_r^T Delta`` and ``a_r^t = u_r^T D_t`` in direction r::

    s_r^t = <a_r, a_r^t> / norm(a_r^t)^2
    W = W_0 + U diag(gamma) U^T Delta,   gamma_r = T / sum_t(max(floor, s_r^t))

Source: Li et al., "When Shared Knowledge Hurts: Spectral Over-Accumulation in Model Merging", arXiv 2602.05536,
algorithm 1. Where ``norm(a_r^t)`` is at most 1e-6 of the norm of D_t, the task has no response, and ``s_r^t`` counts as
0. A task whose D_t is zero is not counted in T. Directions below the rounding of Delta keep their value.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..linalg import Factored, truncated_svd
from ..linalg.decompositions import frobenius_norm
from .base import Cost, TensorJob

# Share of the norm of a task matrix up to which a response is the rounding of one.
NO_RESPONSE = 1e-6


def calibrate_update(base: Tensor, tuned: Sequence[Tensor | Factored], merged: Tensor, floor: float) -> Tensor:
    """Return the calibrated weight of a matrix, in the dtype of the merged one.

    Args:
        base: W_0, (m, n).
        tuned: the T models, or their updates D_t.
        merged: W, in the dtype of the computation; rows and columns that it has unchanged stay so, bit for bit.
        floor: least s_r^t, above 0.

    Raises:
        ConvergenceError: the decomposition failed.

    Examples:
        >>> D = torch.diag(torch.tensor([2.0, 1.0]))
        >>> calibrate_update(torch.zeros(2, 2), [D, D], 2 * D, 0.1)  # over-counted twice
        tensor([[2., 0.],
                [0., 1.]])
    """
    update = merged.double() - base.double()
    changed = update != 0
    rows, columns = changed.any(1).nonzero()[:, 0], changed.any(0).nonzero()[:, 0]
    del changed
    core = update[rows][:, columns]
    if not core.numel():
        return merged
    U = truncated_svd(core, min(core.shape)).U
    responses = U.mT @ core
    tasks, counted = 0, torch.zeros(U.shape[1], dtype=U.dtype, device=U.device)
    for model in tuned:
        own, norm = _response(U, base, model, rows)
        if norm == 0:
            continue
        tasks += 1
        square = own.square().sum(1)
        product = (responses * own[:, columns]).sum(1)
        none = square <= (NO_RESPONSE * norm) ** 2
        counted += torch.where(none, 0, product / square.masked_fill(none, 1)).clamp(min=floor)
    if not tasks:
        return merged
    change = tasks / counted - 1
    update[rows[:, None], columns] = core.addmm_(U * change, responses)
    calibrated = (base.double() + update).to(merged.dtype)
    return torch.where(update == 0, merged, calibrated)  # -0.0 + 0.0 would be +0.0


def _response(U: Tensor, base: Tensor, model: Tensor | Factored, rows: Tensor) -> tuple[Tensor, float]:
    """Return ``U^T D_t`` (r, n), and the norm of D_t."""
    if isinstance(model, Factored):
        left = model.left[rows].double() * model.scale
        return (U.mT @ left) @ model.right.double(), model.norm()
    delta = model.double() - base.double()
    return U.mT @ delta[rows], frobenius_norm(delta)


def svc_cost(job: TensorJob) -> Cost:
    """Return the cost of the calibration of a matrix, beside the merged one: the update and its singular vectors."""
    short, elements = min(job.shape), job.elements
    flops = (8.0 + 2.0 * job.tasks) * short * elements + 9.0 * short**3
    return Cost(8 * (12 * elements + 16 * short**2) + job.itemsize * elements, flops)
