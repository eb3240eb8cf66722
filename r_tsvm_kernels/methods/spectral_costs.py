"""Memory and operations of `tsvm` and `rtsvm`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .. import dispatch
from ..linalg import (
    Solver,
    choose_rank,
    fixed_rank,
    tsv_merge_bytes,
    tsv_merge_flops,
    weighted_merge_bytes,
    weighted_merge_flops,
)
from ..linalg.products.cuda_graph import PRODUCTS
from ..ops import kept_count
from .base import Cost, TensorJob
from .gram import gram_bytes
from .rtsvm_readings import needs_torch, prepared_bytes

if TYPE_CHECKING:
    from .rtsvm import RtsvmParameters
    from .tsvm import TsvmParameters


def solver_for(options: TsvmParameters, device_type: str) -> Solver:
    """Return the solver on a type of device: with ``auto``, ``products`` where kernels run all of its ops.

    A CPU only simulates the formats of tensor cores; so do the references on a GPU.
    """
    if options.solver == "eigen" or options.solver == "products":
        return options.solver
    return "eigen" if device_type == "cpu" or dispatch.by_reference(device_type, *PRODUCTS) else "products"


def spectral_cost(job: TensorJob, options: TsvmParameters, ranks: Sequence[int]) -> Cost:
    """Return the cost of TSV-Merge with its task matrices, at these ranks or smaller ones."""
    shape = (job.shape[0], job.shape[1])
    matrices = job.tasks * job.itemsize * job.elements
    simulated = dispatch.by_reference(job.device_type, *PRODUCTS)
    solving = tsv_merge_bytes(
        shape,
        ranks,
        itemsize=job.itemsize,
        solver=solver_for(options, job.device_type),
        workspace=options.workspace,
        simulated=simulated,
    )
    forming, adding = 2 * job.itemsize * job.elements, (5 * job.itemsize + 1) * job.elements  # one after the other
    return Cost(matrices + max(forming, solving, adding), tsv_merge_flops(shape, ranks))


def tsvm_cost(job: TensorJob, options: TsvmParameters) -> Cost:
    """Return the cost of `tsvm`."""
    return spectral_cost(job, options, [fixed_rank((job.shape[0], job.shape[1]), job.tasks)] * job.tasks)


def rtsvm_cost(job: TensorJob, options: RtsvmParameters) -> Cost:
    """Return the cost of `rtsvm`: statistics and pruning of each task in turn, then TSV-Merge."""
    if needs_torch(options):
        preparing = prepared_bytes(job)
    else:
        statistics = (3 * job.itemsize + 28) * job.elements
        pruning = ((job.tasks + 5) * job.itemsize + 2) * job.elements
        preparing = max(statistics, pruning)
    merging = (
        _weighted_cost(job, options) if options.weighted else spectral_cost(job, options, largest_ranks(job, options))
    )
    return Cost(max(preparing, merging.bytes), merging.flops + 40.0 * job.tasks * job.elements)


def _weighted_cost(job: TensorJob, options: RtsvmParameters) -> Cost:
    """Return the cost of step 6 with its task matrices."""
    shape, limited = (job.shape[0], job.shape[1]), set(options.rules) != {"full"}
    power, itemsize = options.orthogonalization_power, job.itemsize
    solving = weighted_merge_bytes(
        shape,
        job.tasks,
        power=power,
        limited=limited,
        itemsize=itemsize,
        solver=solver_for(options, job.device_type),
        workspace=options.workspace,
    )
    scaling, adding = 3 * itemsize * job.elements, (6 * itemsize + 1) * job.elements  # one after the other
    held = (job.tasks * itemsize) * job.elements + gram_bytes(job)
    flops = weighted_merge_flops(shape, job.tasks, power=power, limited=limited)
    return Cost(held + max(solving, scaling, adding), flops)


def largest_ranks(job: TensorJob, options: RtsvmParameters) -> list[int]:
    """Return upper bounds of the ranks; of shared ranks, bounds of their sum."""
    shape = (job.shape[0], job.shape[1])
    if "shared" in options.rank:
        return [-(-min(shape) // job.tasks)] * job.tasks
    bounds = []
    for rule, density in zip(options.rules, options.density, strict=True):
        # Pruned elements count as small for all values, but not in all readings.
        falling = options.rank_rho >= 0 and not needs_torch(options)
        dropped = 1 - kept_count(density, job.elements) / job.elements if falling else 0.0
        rank = choose_rank(rule, shape, job.tasks, sparsity=dropped, rho=options.rank_rho)
        bounds.append(rank if isinstance(rank, int) else fixed_rank(shape, job.tasks))
    return bounds
