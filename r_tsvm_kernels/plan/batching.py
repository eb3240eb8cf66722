"""Which tensors are merged together: matrices of one kind in batches of the method, everything else alone.

A matrix in a batch gets other last bits than alone. Batches therefore depend on the plan and the kind of device only,
never on budgets, workers, or where a merge was stopped.
"""

from __future__ import annotations

from collections.abc import Hashable

from ..methods import TensorJob
from .merge_plan import MergePlan


def batches(plan: MergePlan, device_type: str) -> list[tuple[str, ...]]:
    """Return the names of all tensors in groups that are merged together, in the order of their first members.

    Successive matrices of equal section, shape, dtypes and options form a batch, up to the size that the method gives
    for them: k and v of neighbouring layers, for example. All others are groups of one.

    Args:
        plan: the merge.
        device_type: ``cpu`` or ``cuda``.
    """
    found: list[list[str]] = []
    unfilled: dict[Hashable, list[str]] = {}
    for name in plan.tensors:
        most = _batch_size(plan, name, device_type)
        key = _kind(plan, name) if most > 1 else name
        group = unfilled.setdefault(key, [])
        if not group:
            found.append(group)
        group.append(name)
        if len(group) == most:
            del unfilled[key]
    return [tuple(group) for group in found]


def _batch_size(plan: MergePlan, name: str, device_type: str) -> int:
    """Return how many such tensors are merged together, at most."""
    own, tensor = plan.section(name), plan.tensors[name]
    method = own.config.method
    if (
        method.run_batch is None
        or tensor.treatment.kind != "merge"
        or tensor.merged_apart.divide
        or tensor.aligned
        or tensor.stored_parts is not None
        or own.parts is not None
        or plan.keeps_factors(name)
    ):
        return 1
    job = TensorJob(tensor.spec.shape, len(own.tuned), own.accumulation(tensor).itemsize, device_type)
    return method.batch(job, tensor.options)


def _kind(plan: MergePlan, name: str) -> Hashable:
    """Return what the tensors of a batch have in common."""
    tensor = plan.tensors[name]
    return id(plan.section(name)), tensor.spec, tensor.merged_dtype, tensor.dtypes, repr(tensor.options)
