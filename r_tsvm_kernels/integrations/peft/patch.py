"""Replaces PEFT's combination of adapters by ours."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any

import torch
from peft.tuners.lora import Conv2d, Embedding, Linear, LoraLayer, LoraModel
from peft.utils import ModulesToSaveWrapper
from torch import Tensor

from ...errors import ConfigError, ConvergenceError, NonFiniteError
from ...linalg import Factored
from ...lora import parse_config
from ...ops._checks import FLOAT_DTYPES, check_finite
from ..installation import Replacements, falling_back
from . import INSTALLATION
from .updates import RULES, combined_triplets

# The method that users call, and the one in which PEFT forms dense updates and decomposes them.
ENTRANCE = "add_weighted_adapter"
METHOD = "_svd_generalized_task_arithmetic_weighted_adapter"
LEFT_TO_PEFT = "left to PEFT"

# Layers whose update is `scaling * B @ A`, unless they override how it is formed.
_PRODUCTS = (Linear, Embedding, Conv2d)
_DEVICES = ("cpu", "cuda")


def patch() -> Replacements:
    """Replace PEFT's functions by ours."""
    left = partial(INSTALLATION.count, LEFT_TO_PEFT)
    return Replacements(
        [
            (LoraModel, ENTRANCE, _refuse_partial_adapters),
            (LoraModel, METHOD, falling_back(combined_factors, (NonFiniteError, ConvergenceError), left)),
        ]
    )


def _refuse_partial_adapters(original: Callable[..., None]) -> Callable[..., None]:
    """Return a function that refuses adapters that PEFT would combine only in part, and gives the result scaling 1.

    PEFT combines only the factors. It loses the magnitudes of DoRA and the biases of `lora_bias`. With an rsLoRA
    adapter, the result gets the scaling ``sqrt(rank)`` instead of 1. For `modules_to_save` the result gets the base's
    modules.
    """

    @wraps(original)
    def run(
        model: LoraModel, adapters: Sequence[str], weights: Sequence[float], adapter_name: str, *args: Any, **named: Any
    ) -> None:
        new = adapter_name not in model.peft_config  # PEFT does not change an existing adapter
        if new and len(weights) != len(adapters):
            raise ConfigError(f"{len(adapters)} adapters but {len(weights)} weights; give one weight for each")
        for name in adapters:
            if new and name in model.peft_config:
                parse_config(model.peft_config[name].to_dict() | {"modules_to_save": None}, f"adapter {name}")
        original(model, adapters, weights, adapter_name, *args, **named)
        if new:
            _scale_by_one(model, adapter_name)
            _take_saved_modules(model, adapters, adapter_name)

    return run


def _scale_by_one(model: LoraModel, adapter: str) -> None:
    """Divide by the rank as plain LoRA does, in the layers and in the configuration that is saved."""
    model.peft_config[adapter].use_rslora = False
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and adapter in layer.scaling:
            layer.use_rslora[adapter] = False
            layer.set_scale(adapter, 1.0)


def _take_saved_modules(model: LoraModel, adapters: Sequence[str], new: str) -> None:
    """Give the result the modules that an adapter replaces in the base; PEFT refuses two for the same one."""
    found = {name for adapter in adapters for name in model.peft_config[adapter].modules_to_save or ()}
    model.peft_config[new].modules_to_save = sorted(found) or None
    for wrapper in model.modules():
        owners = isinstance(wrapper, ModulesToSaveWrapper) and [x for x in adapters if x in wrapper.modules_to_save]
        if owners:
            wrapper.update(new)
            wrapper.modules_to_save[new].load_state_dict(wrapper.modules_to_save[owners[0]].state_dict())
            wrapper.modules_to_save[new].requires_grad_(False)


def combined_factors(
    model: LoraModel,
    combination_type: str,
    adapters: Sequence[str],
    weights: Sequence[float],
    new_rank: int,
    target: LoraLayer,
    target_lora_A: Tensor,
    target_lora_B: Tensor,
    density: float | None,
    majority_sign_method: Any,
    clamp: float | None = None,
    full_matrices: bool = True,
    driver: str | None = None,
) -> tuple[Tensor, Tensor] | None:
    """Return lora_A and lora_B of the combined adapter in one layer; None for layers that PEFT should handle.

    The signature is that of PEFT's method. As with PEFT the result is float32 (float64 if the factors are), and its
    singular values are in lora_B. `full_matrices` and `driver` are ignored.
    """
    # Clamped factors depend on the arbitrary signs of singular vectors, so PEFT must compute them.
    if clamp is not None or not _defined(combination_type, weights, density, majority_sign_method):
        return None
    owned = [(name, float(weight)) for name, weight in zip(adapters, weights, strict=False) if _has(target, name)]
    matrices = [_update(target, name) for name, _ in owned]
    factored = [matrix for matrix in matrices if matrix is not None]
    if not factored or len(factored) < len(matrices):
        return None
    if density is not None and density >= 1 and RULES[combination_type].prune != "none":
        warnings.warn(f"density is {density}: nothing is pruned", stacklevel=2)
    U, values, Vh = combined_triplets(
        factored,
        [weight for _, weight in owned],
        combination_type,
        new_rank,
        density=1.0 if density is None else density,
        majority_sign_method=majority_sign_method,
        seed=int(torch.randint(2**63 - 1, (), device="cpu")),  # torch.manual_seed decides, as in PEFT
    )
    dtype = torch.promote_types(target_lora_A.dtype, torch.float32)
    # The numerical rank may be smaller than the new rank; the rest stays zero.
    A, B = (torch.zeros(factor.shape, dtype=dtype, device=factor.device) for factor in (target_lora_A, target_lora_B))
    A.flatten(1)[: len(values)] = Vh
    B.flatten(1)[:, : len(values)] = U * values
    INSTALLATION.count(combination_type)
    return A, B


def _defined(combination_type: str, weights: Sequence[float], density: float | None, majority: Any) -> bool:
    """Whether the arguments are valid; PEFT reports what is wrong with others."""
    if combination_type not in RULES or not all(math.isfinite(weight) for weight in weights):
        return False
    rule = RULES[combination_type]
    if rule.elect and majority not in ("total", "frequency"):
        return False
    if rule.prune == "none":
        return True
    return density is not None and (density > 0 or (density == 0 and rule.prune == "magnitude"))


def _has(target: LoraLayer, adapter: str) -> bool:
    return adapter in target.lora_A or adapter in target.lora_embedding_A


def _update(target: LoraLayer, adapter: str) -> Factored | None:
    """Return the update of a layer; None if we do not know that this kind of layer has a product.

    Raises:
        NonFiniteError: a factor holds NaN or infinity.
    """
    if not any(type(target).get_delta_weight is kind.get_delta_weight for kind in _PRODUCTS):
        return None
    if isinstance(target, Conv2d) and target.get_base_layer().groups != 1:
        return None
    if adapter in target.lora_A:
        A, B = target.lora_A[adapter].weight.detach(), target.lora_B[adapter].weight.detach()
    else:
        A, B = target.lora_embedding_A[adapter].detach(), target.lora_embedding_B[adapter].detach()
    # In a convolution, A has the kernel and B is 1 x 1.
    A, B = A.flatten(1), B.flatten(1)
    if any(type(factor) is not Tensor or factor.device.type not in _DEVICES for factor in (A, B)):
        return None
    if A.dtype != B.dtype or A.dtype not in FLOAT_DTYPES:
        return None
    for factor in (A, B):
        check_finite(factor, adapter)
    return Factored(B, A, float(target.scaling[adapter]))
