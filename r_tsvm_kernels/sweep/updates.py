"""Candidates that differ only in alpha share the update of their merge: ``W = W_0 + alpha * U``, whatever the method.

Merges that are linear in the weights as well share parts instead, see `r_tsvm_kernels.parts`.
"""

from __future__ import annotations

from pathlib import Path

import torch

from ..config import MergeConfig
from ..plan import MergePlan


def is_scaled(config: MergeConfig) -> bool:
    """Whether alpha scales the update of a merge that costs more than a sum, and changes nothing else.

    Examples:
        >>> is_scaled(MergeConfig("ties")), is_scaled(MergeConfig("task_arithmetic")), is_scaled(MergeConfig("slerp"))
        (True, False, False)
    """
    return (
        "alpha" in config.method.parameters.model_fields
        and config.method.name != "task_arithmetic"
        and not config.requantise
        and config.calibrate is None
        and config.vocabulary is None
        and config.chat_template != "auto"  # that of most models
    )


def can_share(plan: MergePlan) -> bool:
    """Whether a model in float32 holds what candidates share: W_0 as it is loaded, and the update."""
    loaded = None if plan.config.dtype is None else getattr(torch, plan.config.dtype)
    for tensor in plan.tensors.values():
        if tensor.treatment.present_only:  # a mean that alpha does not scale
            return False
        dtype = tensor.parts[0].dtype
        rounded = loaded is not None and torch.promote_types(dtype, loaded) != loaded
        if tensor.treatment.kind == "base" and dtype == torch.float64:  # as it is, which float32 does not hold
            return False
        if tensor.treatment.kind != "base" and (rounded or plan.accumulation(tensor) != torch.float32):
            return False
    return True


def size_of_update(plan: MergePlan) -> int:
    """Return the bytes of the model that `for_update` makes."""
    return sum(
        tensor.elements * (4 if tensor.spec.dtype.is_floating_point else tensor.spec.dtype.itemsize)
        for tensor in plan.tensors.values()
    )


def for_update(config: MergeConfig) -> MergeConfig:
    """Return the recipe of ``W_0 + U`` in float32."""
    alphas, parameters = _alphas(config), config.parameters
    others = {key: value for key, value in parameters.items() if key not in alphas}
    return config.model_copy(update={"parameters": {**others, "alpha": 1.0}, "out_dtype": "float32"})


def from_update(config: MergeConfig, update: Path) -> MergeConfig:
    """Return a recipe of the same merge, from its base and ``W_0 + U``."""
    return MergeConfig(
        "task_arithmetic",
        base_model=config.base_model,
        models=[str(update)],
        parameters={key: config.parameters[key] for key in _alphas(config)},
        out_dtype=config.out_dtype or config.dtype,
        include=config.include,
        exclude=config.exclude,  # the base's values stay there, which may be infinite
        router="base" if config.router == "base" else "merge",  # the update of a mean is scaled as any other
        missing="base",
        chat_template=config.chat_template,
    )


def _alphas(config: MergeConfig) -> list[str]:
    """Return the keys of the recipe that mean alpha."""
    names = config.method.parameters.names()
    return [key for key in config.parameters if names[key] == "alpha"]
