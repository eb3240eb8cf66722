"""The plan of a decomposition: which tensors have parts, and how these are stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..config import MergeConfig, as_dtype
from ..errors import ConfigError
from ..methods import TensorJob
from ..parts import StoredParts, require_linear
from ..parts_folder import Task
from .merge_plan import MergePlan, TensorPlan

# Dtype of the parts by mode: rounding to float32 adds an error of 4e-8, to bfloat16 one of 2e-3.
DTYPES = {"exact": torch.float32, "fast": torch.bfloat16}


@dataclass(frozen=True)
class Decomposition:
    """How to store the parts of a merge.

    Attributes:
        dense_above: mean rank of the parts of a tensor above which they are matrices; None: where factors are larger.
        dtype: of the values; None chooses it by the error that the mode allows.
    """

    dense_above: int | None = None
    dtype: str | None = None


def decomposed(plan: MergePlan, how: Decomposition) -> MergePlan:
    """Return a plan that writes parts instead of merged tensors.

    Raises:
        ConfigError: the merge of the recipe is not linear in the weights, or moves rows of the base.
    """
    require_linear(plan.config)
    if plan.vocabulary is not None and plan.vocabulary.moves_base(plan.base):
        raise ConfigError("vocabulary: parts are added to the base as it is; only the base's tokens can be kept (base)")
    if apart := [name for name, tensor in plan.tensors.items() if tensor.treatment.present_only]:
        raise ConfigError(
            f"missing: {apart[0]} is the mean of the models that have it, which no weight changes; use missing: base"
        )
    tasks = tuple(task.name for task in tasks_of(plan.config))
    tensors = {
        name: replace(tensor, stored_parts=_stored_parts(plan, tensor, tasks, how))
        for name, tensor in plan.tensors.items()
    }
    found = replace(plan, tensors=tensors, shards={})
    for task in tasks:
        own = [name for name in found.specs if name.startswith(f"{task}/")]
        found.shards[f"{task}.safetensors"] = sorted(own, key=lambda name: -found.specs[name].dtype.itemsize)
    return found


def tasks_of(config: MergeConfig) -> list[Task]:
    """Return the tasks of a recipe, with names that are different and can be those of files.

    Examples:
        >>> [task.name for task in tasks_of(MergeConfig("tsvm", models=["org/math", "other/math", "code.safetensors"]))]
        ['math', 'math-2', 'code']
    """
    tasks = list[Task]()
    for entry in config.models:
        model = str(entry.model)
        stem = Path(model).name.removesuffix(".safetensors").replace(":", "-") or "task"
        taken = {task.name for task in tasks}
        name, number = stem, 2
        while name in taken or name == "parts":
            name, number = f"{stem}-{number}", number + 1
        tasks.append(Task(name=name, model=model))
    return tasks


def _stored_parts(plan: MergePlan, tensor: TensorPlan, tasks: tuple[str, ...], how: Decomposition) -> StoredParts:
    wide = plan.accumulation(tensor)
    dtype = DTYPES[getattr(tensor.options, "mode", "exact")] if how.dtype is None else as_dtype(how.dtype)
    if how.dtype is None and wide == torch.float64:
        dtype = wide
    if tensor.treatment.kind == "base":
        return StoredParts(tasks, dtype, ())
    if tensor.treatment.kind == "mean" or tensor.blocks.divide or (ranks := _ranks(plan, tensor)) is None:
        return StoredParts(tasks, dtype, None)
    m, n = tensor.spec.shape
    larger = sum(ranks) * (m + n) >= len(tasks) * m * n
    high = how.dense_above is not None and sum(ranks) > how.dense_above * len(tasks)
    return StoredParts(tasks, dtype, None if larger or high else ranks)


def _ranks(plan: MergePlan, tensor: TensorPlan) -> tuple[int, ...] | None:
    """Return upper bounds of the ranks of the parts."""
    linear, shape = plan.config.method.linear, tensor.spec.shape
    assert linear is not None
    job = TensorJob(shape, len(plan.tuned), plan.accumulation(tensor).itemsize)
    factored: Sequence[int] = plan.update_ranks(tensor.name) if plan.keeps_factors(tensor.name) else ()
    ranks = linear.ranks(job, tensor.options, factored)
    return None if ranks is None else tuple(min(rank, *shape) for rank in ranks)
