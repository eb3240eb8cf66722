"""The tensors of a module that a merge is written to, after checks that this changes the module as it should."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .checkpoint import Checkpoint
from .errors import CheckpointError, ConfigError, DeviceError, DTypeError, ShapeError
from .lora.adapter import is_head
from .ops._checks import FLOAT_DTYPES, check_plain
from .parts_folder import PartsFolder
from .plan import MergePlan
from .text import dtype_name, some


def tensors_of(module: nn.Module, plan: MergePlan, folder: PartsFolder) -> dict[str, Tensor]:
    """Return the tensors of a module, by the names of the base.

    Args:
        module: with the parameters and buffers of the base.
        plan: of the merge.
        folder: its parts.

    Raises:
        ConfigError: it is no module.
        CheckpointError: a tensor is missing, a copy, or tied to another one where the base is not, or the other way.
        ShapeError, DTypeError, DeviceError: a tensor cannot hold the values.
    """
    if not isinstance(module, nn.Module):
        raise ConfigError(f"expected a torch.nn.Module, got {type(module).__name__}; `state_dict` gives tensors alone")
    own = dict(module.state_dict(keep_vars=True))
    if missing := [name for name in plan.tensors if name not in own]:
        raise CheckpointError(
            f"the module has no {some(missing)}, which {plan.base.path} has; its names are {some(list(own))}"
            + _prefixed(list(own), list(plan.tensors))
        )
    memory = {tensor.untyped_storage().data_ptr() for tensor in (*module.parameters(), *module.buffers())
              if tensor.layout == torch.strided}  # fmt: skip
    for name, planned in plan.tensors.items():
        _check(own[name], f"{name} of the module", planned.spec.shape, plan.base.tensors[name].dtype)
        if own[name].numel() and own[name].untyped_storage().data_ptr() not in memory:
            raise CheckpointError(
                f"{name}: the module's state_dict gives a copy, and writing to it would not change the module; remove "
                "the hook that makes it, or load `state_dict` of the parts with load_state_dict"
            )
    _check_ties(own, plan, folder)
    return {name: own[name].detach() for name in plan.tensors}


def _prefixed(own: list[str], names: list[str]) -> str:
    """Return advice if the module wraps the one that is meant."""
    prefixes = {name.removesuffix(names[0]) for name in own if name.endswith(f".{names[0]}")}
    found = [prefix for prefix in sorted(prefixes) if all(f"{prefix}{name}" in own for name in names)]
    return f"; give the module that it has as {found[0].rstrip('.')}" if found else ""


def _check(tensor: Tensor, label: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check_plain(tensor, label)
    if tuple(tensor.shape) != shape:
        raise ShapeError(f"{label}: has shape {tuple(tensor.shape)}, expected {shape}")
    if tensor.device.type == "meta":
        raise DeviceError(f"{label}: is on the meta device and has no values; use .to_empty(device=...) first")
    if tensor.dtype != dtype and not {tensor.dtype, dtype} <= set(FLOAT_DTYPES):
        raise DTypeError(
            f"{label}: has dtype {dtype_name(tensor.dtype)}, which cannot hold the {dtype_name(dtype)} of the base; "
            "give a module that is not quantised"
        )
    if any(step == 0 and size > 1 for step, size in zip(tensor.stride(), tensor.shape, strict=True)):
        raise DTypeError(f"{label}: is expanded, so that several values share memory; use .contiguous() or .clone()")


def _check_ties(own: dict[str, Tensor], plan: MergePlan, folder: PartsFolder) -> None:
    """Require tensors to share memory where those of the base are the same, and only there."""
    first: dict[int, str] = {}
    for name in plan.tensors:
        other = first.setdefault(own[name].data_ptr(), name) if own[name].numel() else name
        one, two = folder.tensors[name], folder.tensors[other]
        same = (one.base, one.checksums) == (two.base, two.checksums)
        if not same or plan.tensors[name].options != plan.tensors[other].options:
            raise CheckpointError(
                f"the module ties {name} to {other}, which {plan.base.path} and its parts have with values of their "
                "own; untie them: give each a parameter"
            )
    for name in own.keys() - plan.tensors.keys():
        if own[name].numel() and own[name].data_ptr() not in first and (
            name in plan.base.tensors or _is_tied_head(name, plan.base)
        ):  # fmt: skip
            raise CheckpointError(
                f"the module has {name} in memory of its own, which {plan.base.path} ties to another tensor; tie "
                "them, as transformers does (tie_weights)"
            )


def _is_tied_head(name: str, base: Checkpoint) -> bool:
    """Whether a head that a base does not store is its embedding."""
    return is_head(name.removesuffix(".weight")) and bool(base.config) and base.config.get("tie_word_embeddings", True)
