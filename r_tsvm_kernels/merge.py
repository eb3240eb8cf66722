"""Merge tensors in memory, one at a time."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from .config import MergeConfig, as_config, as_dtype
from .errors import CheckpointError, ConfigError, DeviceError, DTypeError, NonFiniteError, RtsvmError, ShapeError
from .linalg import Factored
from .methods import METHODS, MergeResult, MethodParameters, TensorReport, mean_task_vector, timed
from .ops import task_statistics
from .ops._checks import FLOAT_DTYPES, accumulation_dtype, check_finite, check_group, check_list, check_plain, is_finite
from .quantised import differing_error, must_agree, same_values
from .text import dtype_name

_LOG = logging.getLogger(__name__)

# Elements of each tensor whose norms are computed at a time.
_PIECE = 1 << 20

# Spectral methods square the norms of weighted task matrices, in float64: the largest norm, with a margin.
_LARGEST_NORM = 1e150


@dataclass(frozen=True)
class Treatment:
    """How one tensor is treated (``merge``, ``mean`` or ``base``) and why; `excluded` if patterns decide it."""

    kind: str
    reason: str = ""
    excluded: bool = False


def merge_tensors(
    base: Tensor | None,
    tuned: Sequence[Tensor | Factored],
    config: MergeConfig | str,
    *,
    name: str = "",
    position: float = 0.0,
    seeded_by: str | None = None,
    out_dtype: torch.dtype | str | None = None,
    measure_norms: bool | None = None,
    **parameters: Any,
) -> MergeResult:
    """Merge T fine-tuned versions of one tensor into its base.

    Args:
        base: the tensor that the others were fine-tuned from; None for a method that needs none (`linear`, `karcher`).
            float64, float32, float16 or bfloat16. Spectral methods apply to (m, n) matrices; tensors of any other rank
            get the mean task vector. Integer and bool tensors are returned unchanged, see `QuantisedRefusedError`.
        tuned: T tensors of the same shape and device; dtypes and strides may differ. A `Factored` update may stand in
            for a tensor: methods that support it never form the task matrix.
        config: name of a method, or a `MergeConfig`. If it lists models, there must be T.
        name: name of the tensor, for filters, patterns, random masks and messages.
        position: position of the tensor's layer in [0, 1], for gradients.
        seeded_by: name that random masks are drawn from, for tied tensors; None means `name`.
        out_dtype: dtype of the result, a `torch.dtype` or its name; None means the config's ``out_dtype``, its
            ``dtype``, or the base's dtype.
        measure_norms: report the norms of the task vectors and of the update, which reads all inputs once more. None:
            only for spectral methods, where the cost is negligible.
        parameters: parameters of the method, such as ``weight=[1.0, 0.5]`` or ``density=0.2``, if `config` is a name:
            see `MergeConfig`.

    Returns:
        MergeResult: a contiguous ``weight`` on the inputs' device, and a ``report`` with ranks, sparsities, outlier
        masses, weights, captured energy, certificate, interference, norms and times. Inputs are never changed; those
        that require grad, such as `torch.nn.Parameter`, are detached, and the result has no graph.

    Raises:
        ShapeError: the shapes differ.
        DeviceError: the devices differ, or a tensor is on the meta device.
        DTypeError: not a tensor, or one that cannot be merged (sparse, wrapped, complex).
        QuantisedRefusedError: an integer or bool tensor of two or more dimensions is not the same in all models.
        NonFiniteError: an input has NaN or infinity, or the merge overflows the dtype of the computation or the output.
        ConfigError: no such method or parameter, no base for a method that needs one, a config for another number of
            tensors, a position outside [0, 1], or a weight that overflows the dtype of the computation.
        ConvergenceError: a decomposition failed or missed its certificate.

    Examples:
        >>> base = torch.zeros(4, 3)
        >>> result = merge_tensors(base, [base + 1.0, base + 3.0], "ties", weight=[1.0, 1.0], density=1.0)
        >>> result.weight[0]
        tensor([2., 2., 2.])
        >>> result
        MergeResult(4x3 float32, ties)
    """
    config = as_config(config, parameters)
    label, stages = name or "tensor", dict[str, list[float]]()
    if not 0 <= position <= 1:
        raise ConfigError(f"{label}: expected a position in [0, 1], got {position}")
    check_list(tuned, "fine-tuned tensors", label)
    dtype = None if out_dtype is None else as_dtype(out_dtype)
    tuned = [
        model if isinstance(model, Factored) else detached(model, f"{label} of tuned[{index}]")
        for index, model in enumerate(tuned)
    ]
    base = base_or_first(base, tuned, config)
    base = detached(base, f"{label} of the base")
    with timed(stages, "merge"), torch.no_grad():
        result = _merged(base, tuned, config, name, position, seeded_by, dtype, measure_norms)
        result.weight = result.weight.contiguous()  # safetensors saves no other
    result.report.stages |= stages
    result.report.seconds = stages["merge"][0]
    _LOG.debug("%s: %s", label, result.report)
    return result


def _merged(
    base: Tensor,
    tuned: Sequence[Tensor | Factored],
    config: MergeConfig,
    name: str,
    position: float,
    seeded_by: str | None,
    out_dtype: torch.dtype | None,
    measure_norms: bool | None,
) -> MergeResult:
    label = name or "tensor"
    if config.base_joins:
        config, tuned = config.with_base_listed(), [*tuned, base]
    options = config.options(len(tuned), name, position, seeded_by=seeded_by)
    decided = treatment(config, options, name, tuple(base.shape), base.dtype, len(tuned))
    if decided.kind == "base":
        _check_agreement(base, tuned, config, decided, label)
        result = MergeResult(base.clone(), TensorReport())
    else:
        differences = decided.kind == "mean" or config.method.needs_base
        limit = math.inf
        if config.method.matrices_only and decided.kind == "merge":
            limit = _LARGEST_NORM / math.sqrt(base.numel()) / max(1.0, *map(abs, options.weight))
        base, tuned = _checked_inputs(base, tuned, config, label, limit if differences else None)
        dtype = accumulation_dtype(base, *(model.left if isinstance(model, Factored) else model for model in tuned))
        check_options(options, dtype, label)
        with _named(label):
            result = _run(base, tuned, config, options, decided.kind, label)
    if base.is_floating_point():
        wide, result.weight = result.weight, stored(result.weight, out_dtype or stored_dtype(config, base.dtype), label)
        if decided.kind != "base" and not is_finite(result.weight):
            raise NonFiniteError(_overflow(wide, options, label))
    report = result.report
    report.method, report.treatment, report.reason = config.method.name, decided.kind, decided.reason
    report.shape = tuple(base.shape)
    if decided.kind != "base" and (config.method.matrices_only if measure_norms is None else measure_norms):
        dense = [model for model in tuned if isinstance(model, Tensor)]
        *distances, report.update_norm = _distances(base, [*dense, result.weight])
        found = iter(distances)
        report.task_norms = [model.norm() if isinstance(model, Factored) else next(found) for model in tuned]
    return result


def _run(
    base: Tensor,
    tuned: Sequence[Tensor | Factored],
    config: MergeConfig,
    options: MethodParameters,
    kind: str,
    label: str,
) -> MergeResult:
    """Merge by the method or by the mean of the task vectors; return the result in the dtype of the computation."""
    if kind != "mean" and config.method.factored(options) and all(isinstance(model, Factored) for model in tuned):
        return config.method.run(base, tuned, options)
    formed = _formed(base, tuned, label)
    if kind == "mean":
        return mean_task_vector(base, formed, options.weight, getattr(options, "alpha", 1.0))
    return config.method.run(base, formed, options)


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


def is_excluded(config: MergeConfig, name: str) -> bool:
    """Whether a tensor takes no part in a merge because of the patterns of the config."""
    return _matches(name, config.exclude) or bool(config.include and not _matches(name, config.include))


def check_same_names(
    base: Mapping[str, object], other: Mapping[str, object], label: str, config: MergeConfig
) -> list[str]:
    """Check that `other` has the tensors of `base`, apart from excluded ones; return those that only `other` has.

    Raises:
        CheckpointError: it lacks a tensor, or has one more.
    """
    beside = sorted(other.keys() - base.keys())
    missing = [name for name in sorted(base.keys() - other.keys()) if not is_excluded(config, name)]
    extra = [name for name in beside if not is_excluded(config, name)]
    if missing or extra:
        parts = [f"{len(names)} {kind} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
                 for kind, names in (("missing", missing), ("extra", extra)) if names]  # fmt: skip
        raise CheckpointError(
            f"{label}: its tensors are not the base's: {' and '.join(parts)}; "
            "all models must be fine-tunes of the same base, with the same layers. Tensors that differ on purpose can "
            "be excluded (--exclude PATTERN): they keep the base's value"
        )
    return beside


def treatment(
    config: MergeConfig,
    options: MethodParameters,
    name: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    tasks: int,
) -> Treatment:
    """Decide what happens to a tensor, from its header alone.

    Raises:
        DTypeError: the tensor is of a floating-point format that cannot be merged (float8, complex).
    """
    if _matches(name, config.exclude):
        return Treatment("base", "excluded by pattern", excluded=True)
    if config.include and not _matches(name, config.include):
        return Treatment("base", "not among the included patterns", excluded=True)
    if not (dtype.is_floating_point or dtype.is_complex):
        return Treatment("base", f"{dtype_name(dtype)} buffer")
    if dtype not in FLOAT_DTYPES:
        advice = "exclude it, to keep the base's" if dtype.is_complex else "convert the checkpoint to bfloat16"
        raise DTypeError(f"{name or 'tensor'}: {dtype} cannot be merged; {advice}")
    if 0 in shape:
        return Treatment("base", "empty")
    if config.method.matrices_only:
        if len(shape) != 2:
            return Treatment("mean", "not a matrix")
        if _matches(name, getattr(options, "exclude_keys", ())):
            return Treatment("mean", "in exclude_keys")
        if config.method.rank_per_task and min(shape) < tasks:
            if config.method.mean_if_rankless:
                return Treatment("mean", "fewer rows or columns than tasks")
            return Treatment("merge", "rank 0: fewer rows or columns than tasks, the base's value stays")
    return Treatment("merge")


def stored_dtype(config: MergeConfig, base_dtype: torch.dtype) -> torch.dtype:
    """Return the dtype a floating-point tensor of the base is stored in after the merge."""
    chosen = config.out_dtype or config.dtype
    if chosen is None or base_dtype not in FLOAT_DTYPES:
        return base_dtype
    dtype: torch.dtype = getattr(torch, chosen)
    return dtype


def _check_agreement(
    base: Tensor, tuned: Sequence[Tensor | Factored], config: MergeConfig, decided: Treatment, label: str
) -> None:
    """Raise an error if a model has other integers than the base: see `must_agree`."""
    if not must_agree(base, excluded=decided.excluded):
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


def _checked_inputs(
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
            _check_factored(base, model, f"{label} of {owner}")
            models.append(model)
        else:
            tensor, largest = loaded(model, owner)
            if limit is not None:
                _check_difference(start, tensor, height + largest, limit, f"{label} of {owner}")
            models.append(tensor)
    return start, models


def _check_factored(base: Tensor, update: Factored, label: str) -> None:
    if update.shape != tuple(base.shape):
        raise ShapeError(f"{label}: the update has shape {update.shape}, the base {tuple(base.shape)}")
    if update.left.device != base.device:
        raise DeviceError(f"{label}: the update is on {update.left.device}, the base on {base.device}")
    for factor in (update.left, update.right):
        check_finite(factor, label)


def _formed(base: Tensor, tuned: Sequence[Tensor | Factored], label: str) -> list[Tensor]:
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


def _distances(base: Tensor, others: Sequence[Tensor]) -> list[float]:
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
        ConfigError: a weight, alpha or t does not.
    """
    for name in ("weight", "alpha", "t"):
        value = getattr(options, name, ())
        for number in value if isinstance(value, tuple) else (value,):
            if abs(number) > torch.finfo(dtype).max:
                raise ConfigError(
                    f"{label}: {name} is {number:g}, beyond {dtype_name(dtype)}, in which the tensor is merged; "
                    "choose a smaller one"
                )


def _overflow(weight: Tensor, options: MethodParameters, label: str) -> str:
    """Return the message for a merge of finite tensors that is not finite, with its factors."""
    given = {name: getattr(options, name) for name in ("weight", "alpha", "t") if hasattr(options, name)}
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


@contextmanager
def _named(label: str) -> Iterator[None]:
    """Prefix errors with the name of the tensor, unless they have it."""
    try:
        yield
    except RtsvmError as error:
        if label in str(error):
            raise
        raise type(error)(f"{label}: {error}") from error


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
