"""Merges without a base, and tensors that some models lack."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .config import MergeConfig
from .errors import ConfigError
from .linalg import Factored
from .methods import METHODS, MergeResult, TensorReport
from .ops._checks import accumulation_dtype, check_finite, check_group
from .treatments import stored_dtype
from .values import stored


def mean_of_present(
    present: Sequence[Tensor],
    config: MergeConfig,
    reason: str,
    *,
    name: str = "",
    out_dtype: torch.dtype | None = None,
) -> MergeResult:
    """Return the mean of those models that have a tensor which others lack; the value itself if it is one model.

    Args:
        present: values of the models, of one shape.
        config: the config; its dtypes apply.
        reason: for the report.
        name: of the tensor.
        out_dtype: dtype of the result; None means the one that the first value would be stored in.

    Raises:
        ShapeError, NonFiniteError: shapes differ; an input is not finite, or a value does not fit.
    """
    first, label = present[0], name or "tensor"
    check_group(first, present, op=label)
    dtype = None if config.dtype is None else getattr(torch, config.dtype)
    for tensor in present:
        check_finite(tensor, label)
    mean = first if dtype is None else stored(first, dtype, label)
    if len(present) > 1:
        wide = accumulation_dtype(*present)
        mean = torch.zeros_like(first, dtype=wide)
        for tensor in present:
            mean += (tensor if dtype is None else stored(tensor, dtype, label)).to(wide) / len(present)
    weight = stored(mean, out_dtype or stored_dtype(config, first.dtype), label)
    weight = weight.clone() if weight is first else weight
    return MergeResult(weight, TensorReport(config.merge_method, "mean", reason, tuple(first.shape)))


def without_base(config: MergeConfig) -> MergeConfig:
    """Return the config for a merge without a base: see `Method.optional_base`.

    Raises:
        ConfigError: it calibrates the change of a base.
    """
    if config.calibrate is not None:
        raise ConfigError(
            f"calibrate: {config.merge_method} without a base changes none; set base_model, or leave it out"
        )
    if not config.method.optional_base:
        return config
    return config.model_copy(update={"parameters": {**config.parameters, "relative": False}})


def base_or_first(base: Any, tuned: Sequence[Any], config: MergeConfig) -> Any:
    """Return the base, or without one the first model, whose shape and dtype the result then has.

    Raises:
        ConfigError: there is no base, and the method needs one.
    """
    if base is not None:
        return base
    if config.method.needs_base or config.base_joins or any(isinstance(model, Factored) for model in tuned):
        without = " and ".join(name for name, method in METHODS.items() if not method.needs_base)
        raise ConfigError(f"{config.merge_method}: expected a base, got None; only {without} merge models without one")
    if not tuned:
        raise ConfigError("a merge needs at least one fine-tuned model, got none")
    return tuned[0]
