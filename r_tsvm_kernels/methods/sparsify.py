"""Code that sparsifying methods share: parameters, selections, seeds of random masks, cost."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from .. import dispatch
from ..ops import Election, Sparsifier, elect_and_sum, kept_count, magnitude_select, task_statistics
from ..ops.elect_and_sum import normalized_shares
from .base import Cost, MethodParameters, PerModel, TensorJob
from .recall import recalled
from .reports import MergeResult, TensorReport
from .task_arithmetic import TaskArithmeticParameters

# Ops of methods that keep some elements and sum or elect them.
SPARSE_OPS = ("elect_and_sum", "magnitude_select", "random_mask", "task_statistics")

Share = Annotated[float, Field(ge=0, le=1)]


class SparseParameters(TaskArithmeticParameters):
    """Parameters of methods that keep some elements of each task vector."""

    density: PerModel[Share] = Field(default=(1.0,), description="fraction of each task vector that is kept")
    rescale: bool = Field(default=False, description="scale the kept elements to the L1 norm of the task vector")
    int8_mask: bool = Field(default=False, description="accepted in recipes and ignored: masks are not stored")


class RandomParameters(SparseParameters):
    """Parameters of methods that drop elements at random."""

    rescale: bool = Field(default=True, description="divide kept elements by the probability of being kept")
    seed: int = Field(default=0, ge=0, lt=2**64, description="of the random masks; the same seed, the same merge")

    def for_tensor(self, name: str) -> MethodParameters:
        """Give the tensor its own seed, so that masks depend neither on the order of tensors nor on threads."""
        return self.model_copy(update={"seed": tensor_seed(self.seed, name)}) if name else self


def tensor_seed(seed: int, name: str) -> int:
    """Return the seed of one tensor of a model."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest(), "little")


def largest_kept(
    base: Tensor, tuned: Sequence[Tensor], options: SparseParameters, outliers: Sequence[int] | None = None
) -> list[Sparsifier]:
    """Keep the largest magnitudes of each task vector, below its `outliers` largest; see `SparseParameters`."""
    counts = [kept_count(density, base.numel()) for density in options.density]
    keys = enumerate(zip(counts, outliers or [0] * len(tuned), strict=True))
    return [
        recalled(("largest", task, *key, options.rescale), partial(_largest_kept, base, tensor, *key, options.rescale))
        for (task, key), tensor in zip(keys, tuned, strict=True)
    ]


def _largest_kept(base: Tensor, tensor: Tensor, count: int, outliers: int, rescale: bool) -> Sparsifier:
    """Keep the `count` largest magnitudes of ``tensor - base`` below the `outliers` largest."""
    sparsifier = Sparsifier()
    if count < base.numel():
        kept, dropped = magnitude_select(tensor, [count + outliers, outliers], base=base)
        sparsifier = Sparsifier(largest=kept, outliers=dropped if outliers else None)
    return rescaled(base, tensor, sparsifier) if rescale else sparsifier


def rescaled(base: Tensor, tensor: Tensor, sparsifier: Sparsifier) -> Sparsifier:
    """Scale the kept elements so that their L1 norm is that of ``tensor - base``."""
    before, after = l1_norm(base, tensor), l1_norm(base, kept_model(base, tensor, sparsifier))
    return replace(sparsifier, rescale=before / after) if after > 0 else sparsifier


def kept_model(base: Tensor, tensor: Tensor, sparsifier: Sparsifier) -> Tensor:
    """Return the base plus the kept differences: the value of the fine-tune, if the differences are exact."""
    return elect_and_sum(base, [tensor], [1.0], sparsifiers=[sparsifier])


def l1_norm(base: Tensor, tensor: Tensor) -> float:
    """Return the sum of ``|tensor - base|`` in float64; NaN or infinite if an element is."""
    statistics = task_statistics(base, [tensor])
    return float(statistics.mean[0]) * statistics.numel


def merge_kept(
    base: Tensor,
    tuned: Sequence[Tensor],
    options: SparseParameters,
    sparsifiers: Sequence[Sparsifier],
    elect: Election,
    out_dtype: torch.dtype | None = None,
) -> MergeResult:
    """Add the sparsified task vectors to the base, after the election of a sign if the method has one."""
    weights = list(options.weight)
    if options.normalize and elect == "none":
        weights = normalized_shares(weights)
    normalize = options.normalize and elect != "none"
    merged = elect_and_sum(
        base, tuned, weights, elect=elect, normalize=normalize, alpha=options.alpha, sparsifiers=sparsifiers,
        out_dtype=out_dtype,
    )  # fmt: skip
    return MergeResult(merged, TensorReport(weights=weights))


def sparse_cost(job: TensorJob, options: Any) -> Cost:
    """Return the cost of sparsifying, electing and summing."""
    per_element = job.summed
    if dispatch.by_reference(job.device_type, "elect_and_sum", "magnitude_select", "random_mask", "task_statistics"):
        per_element += (job.tasks + 7) * job.itemsize + 80
    elif options.rescale and not isinstance(options, RandomParameters):
        per_element = 4 * job.itemsize + 12
    return Cost(per_element * job.elements, (12.0 * job.tasks + 4) * job.elements)
