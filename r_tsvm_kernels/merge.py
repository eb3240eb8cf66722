"""Merge tensors and state dicts in memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from .config import MergeConfig, as_config
from .errors import CheckpointError, ConfigError, DeviceError, DTypeError, NonFiniteError, RtsvmError, ShapeError
from .linalg import Factored
from .methods import MergeResult, MethodParameters, TensorReport, mean_task_vector, timed
from .ops import FLOAT_DTYPES, accumulation_dtype, check_finite, check_group, task_statistics
from .ops._checks import check_list, check_plain, is_finite
from .parameters import layer_positions
from .quantised import differing_error, must_agree, refuse_quantised, same_values
from .tied import same_memory, tied_names

# Elements of each tensor whose norms are taken at a time.
_PIECE = 1 << 20

# Spectral methods square the norms of weighted task matrices, in float64: the largest norm, with a margin.
_LARGEST_NORM = 1e150


@dataclass(frozen=True)
class Treatment:
    """What happens to one tensor (``merge``, ``mean`` or ``base``) and why; `excluded`: because patterns say so."""

    kind: str
    reason: str = ""
    excluded: bool = False


@dataclass(frozen=True)
class StateDictResult:
    """A merged state dict, in the order of the base's, and one report per tensor."""

    state_dict: dict[str, Tensor]
    reports: dict[str, TensorReport]


def merge_tensors(
    base: Tensor,
    tuned: Sequence[Tensor | Factored],
    config: MergeConfig | str,
    *,
    name: str = "",
    position: float = 0.0,
    seeded_by: str | None = None,
    out_dtype: torch.dtype | None = None,
    measure_norms: bool | None = None,
) -> MergeResult:
    """Merge T fine-tuned versions of one tensor into its base.

    Args:
        base: (m, n) for the spectral methods to act; any other shape is merged by mean. float64, float32, float16 or
            bfloat16; integer and bool tensors are returned as they are, see `QuantisedRefusedError` below.
        tuned: T tensors of the same shape and device; dtypes and strides may differ. Or, in place of one, what it
            differs from the base by, as `Factored`: methods that can keep it so form no task matrix, others form one
            tuned tensor.
        config: method and parameters, or the name of a method. If it lists models, there must be T. A `dtype` rounds
            tensors, not factors.
        name: of the tensor: for filters, patterns and messages.
        position: of the tensor's layer in [0, 1], for gradients.
        seeded_by: name that random masks are drawn by, for tied tensors; None means `name`.
        out_dtype: of the result; None means the config's ``out_dtype``, its ``dtype``, or the base's dtype.
        measure_norms: report the norms of the task vectors and of the update, which takes one more read of all inputs;
            None means where the method is spectral, for then that is next to nothing.

    Returns:
        MergeResult: ``weight`` on the inputs' device, ``report`` with ranks, sparsities, outlier masses, weights,
        captured energy, certificate, interference, norms and times. The inputs are not changed; those that require
            grad, such as `torch.nn.Parameter`, are detached, and the result has no graph.

    Raises:
        ShapeError, DeviceError, DTypeError: the tensors do not match, or cannot be merged (sparse, wrapped, meta).
        QuantisedRefusedError: an integer or bool tensor of two or more dimensions is not the same in all models.
        NonFiniteError: an input holds NaN or infinity, or the merge overflows the dtype it computes in or the output's.
        ConfigError: the config does not fit the number of tensors, or a weight does not fit the dtype of the merge.
        ConvergenceError: a decomposition failed or missed its certificate.
    """
    config = as_config(config, {})
    label, stages = name or "tensor", dict[str, list[float]]()
    base = _detached(base, f"{label} of the base")
    check_list(tuned, "fine-tuned tensors", label)
    tuned = [
        model if isinstance(model, Factored) else _detached(model, f"{label} of tuned[{index}]")
        for index, model in enumerate(tuned)
    ]
    with timed(stages, "merge"), torch.no_grad():
        result = _merged(base, tuned, config, name, position, seeded_by, out_dtype, measure_norms)
    result.report.stages |= stages
    result.report.seconds = stages["merge"][0]
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
    plan = treatment(config, options, name, tuple(base.shape), base.dtype, len(tuned))
    if plan.kind == "base":
        _check_agreement(base, tuned, config, plan, label)
        result = MergeResult(base.clone(), TensorReport())
    else:
        differences = plan.kind == "mean" or config.method.needs_base
        limit = math.inf
        if config.method.matrices_only and plan.kind == "merge":
            limit = _LARGEST_NORM / math.sqrt(base.numel()) / max(1.0, *map(abs, options.weight))
        base, tuned = _checked_inputs(base, tuned, config, label, limit if differences else None)
        dtype = accumulation_dtype(base, *(model.left if isinstance(model, Factored) else model for model in tuned))
        check_options(options, dtype, label)
        with _named(label):
            result = _run(base, tuned, config, options, plan.kind, label)
    if base.is_floating_point():
        wide, result.weight = result.weight, stored(result.weight, out_dtype or stored_dtype(config, base.dtype), label)
        if plan.kind != "base" and not is_finite(result.weight):
            raise NonFiniteError(_overflow(wide, options, label))
    report = result.report
    report.method, report.treatment, report.reason = config.method.name, plan.kind, plan.reason
    report.shape = tuple(base.shape)
    if plan.kind != "base" and (config.method.matrices_only if measure_norms is None else measure_norms):
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
    """Merge by the method, or by the mean of the task vectors; in the dtype that is computed in."""
    if kind != "mean" and config.method.factored(options) and all(isinstance(model, Factored) for model in tuned):
        return config.method.run(base, tuned, options)
    formed = _formed(base, tuned, label)
    if kind == "mean":
        return mean_task_vector(base, formed, options.weight, getattr(options, "alpha", 1.0))
    return config.method.run(base, formed, options)


def merge_state_dicts(
    base: Mapping[str, Tensor], tuned: Sequence[Mapping[str, Tensor]], config: MergeConfig | str
) -> StateDictResult:
    """Merge T fine-tuned state dicts into the base's, tensor by tensor.

    Tied tensors, which are copies of one another in the base and in every fine-tune (`tied_names`), are merged once,
    with one random mask, and stay tied: a copy has the result of its original, and shares its memory if it does so in
    the base. Where the config has other parameters for its name, it is merged as a tensor of its own.

    Args:
        base: name to tensor: ``model.state_dict()`` or ``dict(model.named_parameters())``.
        tuned: T state dicts with the same names and shapes.
        config: method and parameters, or the name of a method. If it lists models, there must be T.

    Returns:
        StateDictResult: new tensors without a graph, and a report for each.

    Raises:
        CheckpointError: the names are not the same everywhere.
        ConfigError: a pattern of the config matches no name.
        DTypeError: an argument is no state dict, but a module, for example.
        QuantisedRefusedError: a model is quantised.
        ShapeError, DeviceError, NonFiniteError: as `merge_tensors`, with the tensor's name in the message.

    Example:
        >>> base, math, code = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
        >>> merged = merge_state_dicts(base.state_dict(), [math.state_dict(), code.state_dict()], "rtsvm")
        >>> base.load_state_dict(merged.state_dict)
        <All keys matched successfully>
    """
    config = as_config(config, {})
    check_list(tuned, "state dicts", "tuned")
    base, *tuned = (
        _detached_all(given, label)
        for label, given in [("the base", base), *((f"tuned[{index}]", given) for index, given in enumerate(tuned))]
    )
    refuse_quantised("base", base)
    for index, state_dict in enumerate(tuned):
        refuse_quantised(f"tuned[{index}]", state_dict)
        check_same_names(base, state_dict, f"tuned[{index}]")
    config.check_patterns(base)
    if config.base_joins:
        config, tuned = config.with_base_listed(), [*tuned, base]
    positions, tied = layer_positions(base), tied_names(base, tuned)
    merged: dict[str, Tensor] = {}
    reports: dict[str, TensorReport] = {}

    def rule(name: str, tensor: Tensor, original: str) -> tuple[MethodParameters, Treatment]:
        options = config.options(len(tuned), name, positions[name], seeded_by=original)
        return options, treatment(config, options, name, tuple(tensor.shape), tensor.dtype, len(tuned))

    for name in sorted(base, key=tied.__contains__):  # copies last
        tensor, original = base[name], tied.get(name)
        if original is not None and rule(name, tensor, original) == rule(original, tensor, original):
            merged[name] = merged[original] if same_memory(tensor, base[original]) else merged[original].clone()
            reason = reports[original].reason or f"tied to {original}"
            reports[name] = replace(reports[original], reason=reason, seconds=0.0, stages={})
            continue
        result = merge_tensors(
            tensor, [state_dict[name] for state_dict in tuned], config, name=name, position=positions[name]
        )
        merged[name], reports[name] = result.weight, result.report
    return StateDictResult({name: merged[name] for name in base}, {name: reports[name] for name in base})


def check_same_names(base: Mapping[str, object], other: Mapping[str, object], label: str) -> None:
    """Raise `CheckpointError` unless `other` has exactly the tensors of `base`."""
    missing, extra = sorted(base.keys() - other.keys()), sorted(other.keys() - base.keys())
    if missing or extra:
        parts = [f"{len(names)} {kind} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
                 for kind, names in (("missing", missing), ("extra", extra)) if names]  # fmt: skip
        raise CheckpointError(
            f"{label}: its tensors are not the base's: {' and '.join(parts)}; "
            "all models must be fine-tunes of the same base, with the same layers"
        )


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
        return Treatment("base", f"{str(dtype).removeprefix('torch.')} buffer")
    if dtype not in FLOAT_DTYPES:
        advice = "exclude it, to keep the base's" if dtype.is_complex else "convert the checkpoint to bfloat16"
        raise DTypeError(f"{name}: {dtype} cannot be merged; {advice}")
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
    base: Tensor, tuned: Sequence[Tensor | Factored], config: MergeConfig, plan: Treatment, label: str
) -> None:
    """Refuse to keep the base's integers where a model has others: see `must_agree`."""
    if not must_agree(base, excluded=plan.excluded):
        return
    for owner, model in zip(_owners(config, len(tuned)), tuned, strict=True):
        if isinstance(model, Factored):
            raise DTypeError(f"{label} of {owner}: an update cannot be added to {base.dtype}; dequantise the base")
        if not same_values(base, model):
            raise differing_error(label, owner, model, base)


def _owners(config: MergeConfig, count: int) -> list[str]:
    """Return what messages call the models."""
    owners = [entry.model or f"tuned[{index}]" for index, entry in enumerate(config.models)]
    return owners + [f"tuned[{index}]" for index in range(len(owners), count)]


def _checked_inputs(
    base: Tensor, tuned: Sequence[Tensor | Factored], config: MergeConfig, label: str, limit: float | None
) -> tuple[Tensor, list[Tensor | Factored]]:
    """Round the inputs to the config's dtype, after refusing any that do not match or are not finite.

    Unless `limit` is None, those that differ from the base by more than that, or than their dtype holds, are refused.
    """
    check_group(base, [base if isinstance(model, Factored) else model for model in tuned], op=label)
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
        raise DeviceError(f"{label}: the update lies on {update.left.device}, the base on {base.device}")
    for factor in (update.left, update.right):
        check_finite(factor, label)


def _formed(base: Tensor, tuned: Sequence[Tensor | Factored], label: str) -> list[Tensor]:
    """Return the tuned tensors, forming those that are given as updates: float32, or float64 if anything is."""
    formed = [base_plus(base, model) if isinstance(model, Factored) else model for model in tuned]
    for index, model in enumerate(tuned):
        if isinstance(model, Factored) and not is_finite(formed[index]):
            name = _dtype_name(formed[index].dtype)
            raise NonFiniteError(f"{label} of tuned[{index}]: the base plus its update overflows {name}")
    return formed


def base_plus(base: Tensor, update: Factored) -> Tensor:
    """Return ``base + update`` in the dtype that task vectors are formed in; the base itself if there is no update."""
    if not update.left.shape[1]:
        return base
    dtype = accumulation_dtype(base, update.left)
    return torch.addmm(base.to(dtype), update.left.to(dtype) * update.scale, update.right.to(dtype))


def _check_difference(base: Tensor, tuned: Tensor, bound: float, limit: float, label: str) -> None:
    """Refuse a task vector beyond `limit`, or beyond the dtype it is formed in.

    Args:
        base: the base.
        tuned: the model.
        bound: an upper bound of the magnitudes of the task vector, which is formed only where that does not suffice.
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
            f"{label}: differs from the base by {largest:.3g}, above the {limit:.3g} that {_dtype_name(dtype)} allows "
            "here; repair the checkpoint, scale it down or exclude the tensor"
            + (", or set dtype: float64" if dtype == torch.float32 else "")
        )


def _distances(base: Tensor, others: Sequence[Tensor]) -> list[float]:
    """Return the Frobenius norms of what the others differ from the base, in pieces: the reference would copy all."""
    flat = [tensor.flatten() for tensor in (base, *others)]
    squares = torch.zeros(len(others), dtype=torch.float64)
    for first in range(0, base.numel(), _PIECE):
        origin, *pieces = (tensor[first : first + _PIECE] for tensor in flat)
        found = task_statistics(origin, pieces, sigma=math.inf, eps=0.0)
        squares += found.numel * (found.mean.square() + found.sd.square()).cpu()
    distances: list[float] = squares.sqrt().tolist()
    return distances


def stored(weight: Tensor, dtype: torch.dtype, label: str) -> Tensor:
    """Round to a dtype; a finite value that overflows it is an error, what was not finite before stays.

    Raises:
        NonFiniteError: a value does not fit.
    """
    if weight.dtype == dtype:
        return weight
    stored = weight.to(dtype)
    if not is_finite(stored) and bool((stored.isinf() & weight.isfinite()).any()):
        largest = float(weight.where(weight.isfinite(), 0).abs().amax())
        raise NonFiniteError(
            f"{label}: a value of magnitude {largest:.3g} does not fit {_dtype_name(dtype)}; "
            "choose a wider dtype or out_dtype, or a smaller alpha"
        )
    return stored


def check_options(options: MethodParameters, dtype: torch.dtype, label: str) -> None:
    """Require the factors of a merge to fit the dtype that it computes in.

    Raises:
        ConfigError: a weight, alpha or t does not.
    """
    for name in ("weight", "alpha", "t"):
        value = getattr(options, name, ())
        for number in value if isinstance(value, tuple) else (value,):
            if abs(number) > torch.finfo(dtype).max:
                raise ConfigError(
                    f"{label}: {name} is {number:g}, beyond {_dtype_name(dtype)}, in which the tensor is merged; "
                    "choose a smaller one"
                )


def _overflow(weight: Tensor, options: MethodParameters, label: str) -> str:
    """Say that a merge of finite tensors is not finite, and with which factors."""
    given = {name: getattr(options, name) for name in ("weight", "alpha", "t") if hasattr(options, name)}
    factors = ", ".join(f"{name} {value}" for name, value in given.items())
    return (
        f"{label}: {int(weight.numel() - weight.isfinite().sum())} of {weight.numel()} merged values are NaN or "
        f"infinite: the merge overflows {_dtype_name(weight.dtype)} ({factors}); choose smaller factors, exclude the "
        "tensor, or set dtype: float64"
    )


def _detached(tensor: object, label: str) -> Tensor:
    """Return a plain tensor that shares its memory and has no graph.

    Raises:
        DTypeError: not a tensor, or one that holds no values of its own (sparse, wrapped, quantised).
        DeviceError: it is on the meta device, which holds no values.
    """
    check_plain(tensor, label)
    assert isinstance(tensor, Tensor)
    if tensor.device.type == "meta":
        raise DeviceError(f"{label}: is on the meta device and has no values; load the weights first")
    return tensor.detach().as_subclass(Tensor)


def _detached_all(state_dict: object, label: str) -> dict[str, Tensor]:
    """Return a state dict of plain tensors, see `_detached`.

    Raises:
        DTypeError, DeviceError: it is no state dict, or holds what cannot be merged.
    """
    if not isinstance(state_dict, Mapping):
        raise DTypeError(f"{label}: expected a state dict, got {type(state_dict).__name__}; give model.state_dict()")
    return {name: _detached(tensor, f"{name} of {label}") for name, tensor in state_dict.items()}


@contextmanager
def _named(label: str) -> Iterator[None]:
    """Put the name of the tensor in front of errors that do not know it."""
    try:
        yield
    except RtsvmError as error:
        if label in str(error):
            raise
        raise type(error)(f"{label}: {error}") from error


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
