"""Check the tensors of a merge, and convert them: finite, small enough, rounded, stored."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from .config import MergeConfig
from .errors import ConfigError, DeviceError, DTypeError, NonFiniteError, ShapeError
from .linalg import Factored
from .methods import MethodParameters
from .ops import task_statistics
from .ops._checks import accumulation_dtype, check_finite, check_group, check_plain, is_finite
from .quantised import differing_error, must_agree, same_values
from .text import dtype_name

# Elements of each tensor whose norms are computed at a time.
_PIECE = 1 << 20
# Parameters that multiply values.
_FACTORS = ("weight", "alpha", "t", "scale")


def check_agreement(
    base: Tensor, tuned: Sequence[Tensor | Factored], config: MergeConfig, excluded: bool, label: str
) -> None:
    """Raise an error if a model has other integers than the base: see `must_agree`."""
    if not must_agree(base, excluded=excluded):
        return
    for owner, model in zip(_owners(config, len(tuned)), tuned, strict=True):
        if isinstance(model, Factored):
            raise DTypeError(f"{label} of {owner}: an update cannot be added to {base.dtype}; dequantise the base")
        if not same_values(base, model):
            raise differing_error(label, owner, model, base)


def _owners(config: MergeConfig, count: int) -> list[str]:
    """Return the names of the models for messages."""
    owners = [entry.model or f"tuned[{index}]" for index, entry in enumerate(config.models)]
    return owners + [f"tuned[{index}]" for index in range(len(owners), count)]


def checked_inputs(
    base: Tensor, tuned: Sequence[Tensor | Factored], config: MergeConfig, label: str, limit: float | None
) -> tuple[Tensor, list[Tensor | Factored]]:
    """Check that the inputs match and are finite, and round them to the config's dtype.

    Unless `limit` is None, differences from the base must not exceed `limit` or the range of their dtype.
    """
    check_group(base, [base if isinstance(model, Factored) else model for model in tuned], op=label, optional_base=True)
    dtype = None if config.dtype is None else getattr(torch, config.dtype)

    def loaded(tensor: Tensor, owner: str) -> tuple[Tensor, float]:
        largest = check_finite(tensor, f"{label} of {owner}")
        return tensor if dtype is None else stored(tensor, dtype, f"{label} of {owner}"), largest

    models = list[Tensor | Factored]()
    start, height = loaded(base, "the base")
    for owner, model in zip(_owners(config, len(tuned)), tuned, strict=True):
        if isinstance(model, Factored):
            check_factored(base, model, f"{label} of {owner}")
            models.append(model)
        else:
            tensor, largest = loaded(model, owner)
            if limit is not None:
                _check_difference(start, tensor, height + largest, limit, f"{label} of {owner}")
            models.append(tensor)
    return start, models


def check_factored(base: Tensor, update: Factored, label: str) -> None:
    """Require an update to be finite, of the shape of the base, and on its device."""
    if update.shape != tuple(base.shape):
        raise ShapeError(f"{label}: the update has shape {update.shape}, the base {tuple(base.shape)}")
    if update.left.device != base.device:
        raise DeviceError(f"{label}: the update is on {update.left.device}, the base on {base.device}")
    for factor in (update.left, update.right):
        check_finite(factor, label)


def formed(base: Tensor, tuned: Sequence[Tensor | Factored], label: str) -> list[Tensor]:
    """Return the tuned tensors; form those that are given as updates, in float32, or float64 if anything is."""
    formed = [base_plus(base, model) if isinstance(model, Factored) else model for model in tuned]
    for index, model in enumerate(tuned):
        if isinstance(model, Factored) and not is_finite(formed[index]):
            name = dtype_name(formed[index].dtype)
            raise NonFiniteError(f"{label} of tuned[{index}]: the base plus its update overflows {name}")
    return formed


def base_plus(base: Tensor, update: Factored) -> Tensor:
    """Return ``base + update`` in the dtype that task vectors are formed in; the base itself if there is no update."""
    if not update.left.shape[1]:
        return base
    dtype = accumulation_dtype(base, update.left)
    return torch.addmm(base.to(dtype), update.left.to(dtype) * update.scale, update.right.to(dtype))


def _check_difference(base: Tensor, tuned: Tensor, bound: float, limit: float, label: str) -> None:
    """Require a task vector to stay within `limit` and within the dtype that it is formed in.

    Args:
        base: the base.
        tuned: the model.
        bound: an upper bound of the magnitudes of the task vector, which is formed only if the bound is too large.
        limit: the largest magnitude.
        label: for the message.

    Raises:
        NonFiniteError: it is too large.
    """
    dtype = accumulation_dtype(base, tuned)
    limit = min(limit, torch.finfo(dtype).max)
    if bound <= limit:
        return
    pieces = zip(*(torch.split(tensor.flatten(), _PIECE) for tensor in (base, tuned)), strict=True)
    largest = max(float((after.to(dtype) - before.to(dtype)).abs().amax()) for before, after in pieces)
    if not largest <= limit:
        raise NonFiniteError(
            f"{label}: differs from the base by {largest:.3g}, above the {limit:.3g} that {dtype_name(dtype)} allows "
            "here; repair the checkpoint, scale it down or exclude the tensor"
            + (", or set dtype: float64" if dtype == torch.float32 else "")
        )


def distances(base: Tensor, others: Sequence[Tensor]) -> list[float]:
    """Return the Frobenius norms of the differences from the base, in pieces, to avoid a copy of the whole tensor."""
    flat = [tensor.flatten() for tensor in (base, *others)]
    squares = torch.zeros(len(others), dtype=torch.float64, device="cpu")
    for first in range(0, base.numel(), _PIECE):
        origin, *pieces = (tensor[first : first + _PIECE] for tensor in flat)
        found = task_statistics(origin, pieces, sigma=math.inf, eps=0.0)
        squares += found.numel * (found.mean.square() + found.sd.square()).cpu()
    distances: list[float] = squares.sqrt().tolist()
    return distances


def stored(weight: Tensor, dtype: torch.dtype, label: str) -> Tensor:
    """Round to a dtype; a finite value that overflows is an error, other values stay infinite or NaN.

    Raises:
        NonFiniteError: a value does not fit.
    """
    if weight.dtype == dtype:
        return weight
    stored = weight.to(dtype)
    if not is_finite(stored) and bool((stored.isinf() & weight.isfinite()).any()):
        largest = float(weight.where(weight.isfinite(), 0).abs().amax())
        raise NonFiniteError(
            f"{label}: a value of magnitude {largest:.3g} does not fit {dtype_name(dtype)}; "
            "choose a wider dtype or out_dtype, or a smaller alpha"
        )
    return stored


def check_options(options: MethodParameters, dtype: torch.dtype, label: str) -> None:
    """Require the factors of a merge to fit the dtype of the computation.

    Raises:
        ConfigError: a factor, such as a weight or alpha, does not.
    """
    for name in _FACTORS:
        value = getattr(options, name, ())
        for number in value if isinstance(value, tuple) else (value,):
            if abs(number) > torch.finfo(dtype).max:
                raise ConfigError(
                    f"{label}: {name} is {number:g}, beyond {dtype_name(dtype)}, in which the tensor is merged; "
                    "choose a smaller one"
                )


def overflow(weight: Tensor, options: MethodParameters, label: str) -> str:
    """Return the message for a merge of finite tensors that is not finite, with its factors."""
    given = {name: getattr(options, name) for name in _FACTORS if hasattr(options, name)}
    factors = ", ".join(f"{name} {value}" for name, value in given.items())
    return (
        f"{label}: {int(weight.numel() - weight.isfinite().sum())} of {weight.numel()} merged values are NaN or "
        f"infinite: the merge overflows {dtype_name(weight.dtype)} ({factors}); choose smaller factors, exclude the "
        "tensor, or set dtype: float64"
    )


def detached(tensor: object, label: str) -> Tensor:
    """Return a plain tensor with the same memory and without a graph.

    Raises:
        DTypeError: not a tensor, or not a plain dense one (sparse, wrapped, quantised, uninitialized).
        DeviceError: it is on the meta device and has no values.
    """
    if isinstance(tensor, Tensor) and is_lazy(tensor):
        raise DTypeError(f"{label}: a parameter of a lazy module has no values; run the module on an input first")
    if isinstance(tensor, torch.nn.Module):
        raise DTypeError(f"{label}: expected a torch.Tensor, got the module {type(tensor).__name__}; use merge_models")
    check_plain(tensor, label)
    assert isinstance(tensor, Tensor)
    if tensor.device.type == "meta":
        raise DeviceError(f"{label}: is on the meta device and has no values; load the weights first")
    return tensor.detach().as_subclass(Tensor)
