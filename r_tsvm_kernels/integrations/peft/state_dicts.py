"""Combine adapters given as state dicts, without a model and without PEFT."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any, get_args

import torch
from torch import Tensor

from ...errors import CheckpointError, ConfigError
from ...linalg import Factored, fixed_rank, leading_triplets, merge_factored
from ...lora import (
    InMemoryAdapter,
    base_layer_name,
    common_base_layers,
    common_modules,
    from_triplets,
    make_config,
    stored_factors,
)
from .updates import RULES, MajoritySign, combined_triplets

COMBINATION_TYPES = (*RULES, "linear", "tsvm")


def combine_adapters(
    adapters: Sequence[Mapping[str, Tensor]],
    configs: Sequence[Mapping[str, Any]],
    weights: Sequence[float] | None = None,
    combination_type: str = "svd",
    *,
    rank: int | None = None,
    density: float | None = None,
    majority_sign_method: MajoritySign = "total",
    seed: int = 0,
    dtype: torch.dtype | None = None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Combine LoRA adapters of one base into one adapter.

    With updates ``D_t = scaling_t * B_t @ A_t`` and weights w_t:

    - ``svd``: ``sum(w_t D_t)``, cut to `rank`; exact, and never formed.
    - ``linear``: PEFT's approximation ``(sum(b_t B_t)) @ (sum(a_t A_t))`` with ``b_t = sqrt(abs(w_t scaling_t))`` and
      ``a_t = sign(w_t scaling_t) b_t``; adapters of one rank only. It has cross terms: prefer ``svd``.
    - ``magnitude_prune_svd``, ``ties_svd``, ``dare_linear_svd``, ``dare_ties_svd``: prune every D_t, by magnitude or at
      random, then take the sum, or the disjoint mean of the updates with the elected sign; cut to `rank`.
    - ``tsvm``: TSV-Merge of the updates (Gargiulo et al., CVPR 2025), cores weighted by w_t; never formed.

    If an adapter lacks a module, it does not take part in that module. For PEFT's own types the results are those of
    its ``add_weighted_adapter`` (0.21.2), up to rounding; see `install` for the differences.

    Args:
        adapters: T state dicts as ``adapter_model.safetensors`` holds them; any float dtypes, one device.
        configs: T configurations as ``adapter_config.json`` holds them, or PEFT's ``LoraConfig.to_dict()``.
        weights: T finite numbers of any sign; None means 1.
        combination_type: one of `COMBINATION_TYPES`.
        rank: rank of the new adapter; None means the largest rank of the adapters, or for ``tsvm`` the exact merge.
        density: fraction of the elements that pruning keeps, in (0, 1]; for the types that prune.
        majority_sign_method: sign election of the ``ties`` types: by sum (``total``) or by number (``frequency``).
        seed: seed of the random masks of the ``dare`` types; each module has its own masks.
        dtype: of the new factors; None means the widest of the given ones.

    Returns:
        State dict and configuration of the new adapter, for ``save_file`` and ``json.dump`` or PEFT's ``LoraConfig``.
        The scaling is 1, each factor has the square roots of the singular values, and modules with an update of zero
        are left out.

    Raises:
        ConfigError: invalid arguments, or adapters of several ranks for ``linear``.
        AdapterRefusedError, CheckpointError: an adapter is damaged or of a kind that is not supported, or all updates
            cancel out.
        ShapeError: the adapters do not belong to one base.
        NonFiniteError, ConvergenceError: the values cannot be combined.
    """
    factors = [1.0] * len(adapters) if weights is None else [float(weight) for weight in weights]
    _check_arguments(adapters, configs, factors, combination_type, rank, density, majority_sign_method)
    sources = [
        InMemoryAdapter(tensors, config, f"adapters[{index}]")
        for index, (tensors, config) in enumerate(zip(adapters, configs, strict=True))
    ]
    names = common_modules(sources)
    ranks = {module.rank for source in sources for module in source.modules.values()}
    if combination_type == "linear" and len(ranks) > 1:
        raise ConfigError(f"linear needs adapters of one rank, got ranks {sorted(ranks)}; svd takes any")
    if not ranks:
        raise CheckpointError("the adapters hold no tensors")
    limit = max(ranks) if rank is None and combination_type != "tsvm" else rank
    device = next(tensor.device for adapter in adapters for tensor in adapter.values())

    state_dict: dict[str, Tensor] = {}
    new_ranks: dict[str, int] = {}
    for position, name in enumerate(names):
        own = [(source, weight) for source, weight in zip(sources, factors, strict=True) if name in source.modules]
        matrices = [source.load(name, device) for source, _ in own]
        shares = [weight for _, weight in own]
        if combination_type in RULES:
            assert limit is not None
            U, values, Vh = combined_triplets(
                matrices,
                shares,
                combination_type,
                limit,
                density=1.0 if density is None else density,
                majority_sign_method=majority_sign_method,
                seed=(seed + position) % 2**64,
            )
        else:
            combine = _linear if combination_type == "linear" else _tsvm
            combined = combine(matrices, shares)
            found = leading_triplets(combined, min(limit or combined.left.shape[1], *combined.shape))
            U, values, Vh = found.U, found.S, found.Vh
        if len(values):
            embedding = own[0][0].modules[name].embedding
            stored = dtype or reduce(torch.promote_types, [matrix.left.dtype for matrix in matrices])
            state_dict |= stored_factors(name, from_triplets(U, values, Vh), stored, embedding=embedding)
            new_ranks[name] = len(values)
    if not new_ranks:
        raise CheckpointError("nothing is left: the updates of all modules cancel out, or all weights are 0")
    for name, weight in common_base_layers(sources):
        if name in new_ranks:
            state_dict[base_layer_name(name)] = weight
    first = sources[0].config
    return state_dict, make_config(
        new_ranks,
        dict.fromkeys(new_ranks, 1.0),
        base=first.base_model_name_or_path,
        task_type=first.task_type,
        fan_in_fan_out=first.fan_in_fan_out,
    )


def _linear(matrices: Sequence[Factored], weights: Sequence[float]) -> Factored:
    scaled = [weight * matrix.scale for matrix, weight in zip(matrices, weights, strict=True)]
    roots = [math.sqrt(abs(factor)) for factor in scaled]
    left = sum(root * matrix.left.double() for root, matrix in zip(roots, matrices, strict=True))
    right = sum(
        math.copysign(root, factor) * matrix.right.double()
        for root, factor, matrix in zip(roots, scaled, matrices, strict=True)
    )
    assert isinstance(left, Tensor) and isinstance(right, Tensor)
    return Factored(left, right)


def _tsvm(matrices: Sequence[Factored], weights: Sequence[float]) -> Factored:
    ranks = [fixed_rank(matrices[0].shape, len(matrices))] * len(matrices)
    return merge_factored(matrices, ranks, weights).update


def _check_arguments(
    adapters: Sequence[object],
    configs: Sequence[object],
    weights: Sequence[float],
    combination_type: str,
    rank: int | None,
    density: float | None,
    majority: str,
) -> None:
    if not adapters or not len(adapters) == len(configs) == len(weights):
        raise ConfigError(
            f"{len(adapters)} adapters, {len(configs)} configs and {len(weights)} weights; "
            "give one config and one weight per adapter"
        )
    if not all(math.isfinite(weight) for weight in weights):
        raise ConfigError(f"weights must be finite, got {list(weights)}")
    if combination_type not in COMBINATION_TYPES:
        raise ConfigError(f"combination_type must be one of {', '.join(COMBINATION_TYPES)}, got {combination_type!r}")
    if rank is not None and rank < 1:
        raise ConfigError(f"rank must be at least 1, got {rank}")
    prunes = combination_type in RULES and RULES[combination_type].prune != "none"
    if prunes and (density is None or not 0 < density <= 1):
        raise ConfigError(f"{combination_type} needs a density above 0 and at most 1, got {density}")
    if majority not in get_args(MajoritySign):
        raise ConfigError(f"majority_sign_method must be total or frequency, got {majority!r}")
