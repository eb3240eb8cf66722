"""Memory and operations of a planned merge."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..checkpoint import rows_of_scale
from ..lora.adapted_model import AdaptedModel
from ..methods import Cost, TensorJob, elementwise_cost, factored_cost, svc_cost
from .merge_plan import MergePlan, TensorPlan

# Scalars, masks of a row, whole pages.
_SMALL = 1 << 19
# Pieces of a tensor that is rounded to FP8.
_ROUNDING = 32 << 20


@dataclass(frozen=True)
class Footprint:
    """Memory for merging one tensor, or some of its rows.

    Attributes:
        inputs: bytes of the stored inputs.
        work: upper bound of the bytes in use at a time beside the inputs, output included.
        output: bytes of the merged tensor in its stored dtype.
    """

    inputs: int
    work: int
    output: int


def total_flops(plan: MergePlan) -> float:
    """Return the estimated number of operations of a merge."""
    return sum(tensor_cost(plan, name).flops for name in plan.tensors)


def tensor_cost(plan: MergePlan, name: str, shape: tuple[int, ...] | None = None, device_type: str = "cpu") -> Cost:
    """Return the estimated memory and operations of the method for a tensor.

    Args:
        plan: the merge.
        name: of the tensor.
        shape: shape of some of its rows; None means the whole tensor.
        device_type: ``cpu`` or ``cuda``.
    """
    plan, tensor = plan.section(name), plan.tensors[name]
    shape = tensor.spec.shape if shape is None else shape
    if not tensor.merged_apart.divide:
        return matrix_cost(plan, name, shape, device_type)
    blocks = tensor.merged_apart.shapes(shape)
    costs = [matrix_cost(plan, name, block, device_type) for block in blocks]
    itemsize = plan.accumulation(tensor).itemsize
    job = TensorJob(tensor.merged_apart.largest(shape), len(plan.tuned), itemsize, device_type)
    together = plan.config.method.batch(job, tensor.options)
    # The results of a batch, and the whole tensor in its stored dtype.
    stored = tensor.merged_dtype.itemsize * (math.prod(shape) + together * job.elements)
    count = tensor.merged_apart.count(shape) / len(blocks)
    return Cost(together * max(cost.bytes for cost in costs) + stored, count * sum(cost.flops for cost in costs))


def rows_at_a_time(plan: MergePlan, name: str, device_type: str) -> int:
    """Return how many rows have to be merged together: those that share scales, or experts of a batch.

    A batch changes how sums are rounded.
    """
    plan, tensor = plan.section(name), plan.tensors[name]
    unit = 1 if tensor.fp8 is None else rows_of_scale(tensor.fp8)
    if not tensor.merged_apart.packed:
        return unit
    job = TensorJob(
        tensor.merged_apart.largest(tensor.spec.shape), len(plan.tuned), plan.accumulation(tensor).itemsize, device_type
    )
    return min(tensor.rows, math.lcm(unit, plan.config.method.batch(job, tensor.options)))


def matrix_cost(plan: MergePlan, name: str, shape: tuple[int, ...], device_type: str = "cpu") -> Cost:
    """Return the cost of one matrix of this shape, or of a tensor of another rank, with the treatment of a tensor."""
    plan, tensor = plan.section(name), plan.tensors[name]
    if tensor.treatment.kind == "base":
        return Cost(tensor.dtypes[0].itemsize * math.prod(shape), 0.0)
    rounded = tensor.merged_dtype.itemsize if _rounds(plan, name) else None
    job = TensorJob(shape, len(plan.tuned), plan.accumulation(tensor).itemsize, device_type, rounded)
    ranks = plan.update_ranks(name)
    if plan.parts is not None:
        return _cost_of_parts(job, ranks)
    if plan.config.calibrate is not None and tensor.treatment.kind == "merge" and len(shape) == 2:
        merging, own = _merging_cost(plan, name, job, ranks), svc_cost(job)
        return Cost(max(merging.bytes, _formed(plan, tensor, job) + own.bytes), merging.flops + own.flops)
    return _merging_cost(plan, name, job, ranks)


def _rounds(plan: MergePlan, name: str) -> bool:
    """Whether the method, or the mean, rounds the merged tensor itself."""
    tensor = plan.tensors[name]
    rounds = plan.config.method.rounds or tensor.treatment.kind == "mean"
    return rounds and plan.config.calibrate is None and plan.parts is None


def _merging_cost(plan: MergePlan, name: str, job: TensorJob, ranks: Sequence[int]) -> Cost:
    tensor = plan.tensors[name]
    if plan.keeps_factors(name):
        return factored_cost(job, ranks)
    cost_of = elementwise_cost if tensor.treatment.kind == "mean" else plan.config.method.cost
    cost = cost_of(job, tensor.options)
    flops = 2.0 * job.elements * sum(ranks)
    return Cost(cost.bytes + _formed(plan, tensor, job), cost.flops + flops)


def _formed(plan: MergePlan, tensor: TensorPlan, job: TensorJob) -> int:
    """Return the bytes of tuned tensors that are formed from updates."""
    # The tuned tensors, formed in sequence, and a float32 or float64 copy of the tensor that the update is added to.
    formed = sum(isinstance(model, AdaptedModel) for model in plan.tuned) + 1 if tensor.factor_ranks else 0
    formed += 2 * any(part.whole for part in tensor.parts)
    return formed * job.itemsize * job.elements


def _cost_of_parts(job: TensorJob, ranks: Sequence[int]) -> Cost:
    """Return the cost of merging parts: scaled factors side by side, their product, and the update."""
    factors = 3 * job.itemsize * sum(ranks) * sum(job.shape) if any(ranks) else 0
    flops = (2.0 * sum(ranks) if any(ranks) else 2.0 * job.tasks) * job.elements
    return Cost(factors + (6 * job.itemsize + 1) * job.elements, flops)


def _storing_cost(tensor: TensorPlan, elements: int, itemsize: int) -> int:
    """Return the bytes of parts beside those of the merge: as they are found, as they are stored, and between."""
    assert tensor.stored_parts is not None
    tasks, ranks = len(tensor.stored_parts.tasks), tensor.stored_parts.ranks
    if ranks is None:
        return (2 * itemsize + tensor.stored_parts.dtype.itemsize) * tasks * elements
    columns = sum(tensor.spec.shape) if ranks else 0
    return 8 * columns * (2 * sum(ranks) + 6 * max(ranks, default=0)) + 64 * max(ranks, default=0) ** 2


def footprint(plan: MergePlan, name: str, rows: int | None = None, device_type: str = "cpu") -> Footprint:
    """Return the memory that `merge_tensors` needs for a tensor.

    Args:
        plan: the merge.
        name: of the tensor.
        rows: number of rows that are merged at a time; None means all.
        device_type: ``cpu`` or ``cuda``.
    """
    plan, tensor = plan.section(name), plan.tensors[name]
    shape = tensor.spec.shape if rows is None else (rows, *tensor.spec.shape[1:])[: len(tensor.spec.shape)]
    elements = math.prod(shape)
    stored = tensor.spec.dtype.itemsize * elements
    if tensor.stored_parts is not None:
        rows_of_all = tensor.rows if rows is None else rows
        stored = sum(spec.nbytes for spec in tensor.outputs.values()) * rows_of_all // max(1, tensor.rows)
    result = tensor.dtypes[0] if tensor.treatment.kind == "base" else plan.accumulation(tensor)
    rounding = 0 if result == tensor.spec.dtype else stored  # the wide and the stored tensor
    if tensor.fp8 is not None:
        rounding += tensor.merged_dtype.itemsize * elements + _ROUNDING
    work = tensor_cost(plan, name, shape, device_type).bytes
    if tensor.treatment.kind == "base" or tensor.fp8 is not None or not _rounds(plan, name):
        work = max(work, result.itemsize * elements + rounding)
    if tensor.stored_parts is not None:
        work += _storing_cost(tensor, elements, plan.accumulation(tensor).itemsize) + stored
    if tensor.treatment.kind != "base" and plan.config.dtype is not None:
        loaded: torch.dtype = getattr(torch, plan.config.dtype)
        rounded = sum(part.rank is None and part.dtype != loaded for part in tensor.parts)
        work += rounded * loaded.itemsize * elements
    return Footprint(sum(part.nbytes(elements) for part in tensor.parts), work + _SMALL, stored)
