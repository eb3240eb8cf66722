"""Merge tensors and state dicts in memory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from .config import MergeConfig
from .errors import CheckpointError, DeviceError, DTypeError, NonFiniteError, ShapeError
from .linalg import Factored
from .methods import MergeResult, MethodParameters, TensorReport, mean_task_vector, timed
from .ops import FLOAT_DTYPES, accumulation_dtype, check_finite, check_group, task_statistics
from .parameters import layer_positions
from .quantised import differing_error, must_agree, refuse_quantised, same_values
from .tied import same_memory, tied_names

# Elements of each tensor whose norms are taken at a time.
_PIECE = 1 << 20


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
    config: MergeConfig,
    *,
    name: str = "",
    position: float = 0.0,
    out_dtype: torch.dtype | None = None,
    measure_norms: bool | None = None,
) -> MergeResult:
    """Merge T fine-tuned versions of one tensor into its base.

    Args:
        base: (m, n) for the spectral methods to act; any other shape is merged by mean. float64, float32, float16 or
            bfloat16; integer and bool tensors are returned as they are, see `QuantisedRefused` below.
        tuned: T tensors of the same shape and device; dtypes may differ. Or, in place of one, what it differs from the
            base by, as `Factored`: methods that can keep it so form no task matrix, others form one tuned tensor.
        config: method and parameters. If it lists models, there must be T. A `dtype` rounds tensors, not factors.
        name: of the tensor: for filters, patterns and messages.
        position: of the tensor's layer in [0, 1], for gradients.
        out_dtype: of the result; None means the config's ``out_dtype``, its ``dtype``, or the base's dtype.
        measure_norms: report the norms of the task vectors and of the update, which takes one more read of all inputs;
            None means where the method is spectral, for then that is next to nothing.

    Returns:
        MergeResult: ``weight`` on the inputs' device, ``report`` with ranks, sparsities, outlier masses, weights,
        captured energy, certificate, interference, norms and times. The inputs are not changed.

    Raises:
        ShapeError, DeviceError, DTypeError: the tensors do not match, or cannot be merged.
        QuantisedRefused: an integer or bool tensor of two or more dimensions is not the same in all models.
        NonFiniteError: an input holds NaN or infinity, or the result does not fit the output dtype.
        ConfigError: the config does not fit the number of tensors.
        ConvergenceError: a decomposition failed or missed its certificate.
    """
    stages: dict[str, list[float]] = {}
    with timed(stages, "merge"):
        result = _merged(base, tuned, config, name, position, out_dtype, measure_norms)
    result.report.stages |= stages
    result.report.seconds = stages["merge"][0]
    return result


def _merged(
    base: Tensor,
    tuned: Sequence[Tensor | Factored],
    config: MergeConfig,
    name: str,
    position: float,
    out_dtype: torch.dtype | None,
    measure_norms: bool | None,
) -> MergeResult:
    label = name or "tensor"
    if config.base_joins:
        config, tuned = config.with_base_listed(), [*tuned, base]
    options = config.options(len(tuned), name, position)
    plan = treatment(config, options, name, tuple(base.shape), base.dtype, len(tuned))
    if plan.kind == "base":
        _check_agreement(base, tuned, config, plan, label)
        result = MergeResult(base.clone(), TensorReport())
    else:
        base, tuned = _checked_inputs(base, tuned, config, label)
        if plan.kind == "mean":
            result = mean_task_vector(base, _formed(base, tuned), options.weight, getattr(options, "alpha", 1.0))
        elif config.method.factored(options) and all(isinstance(model, Factored) for model in tuned):
            result = config.method.run(base, tuned, options)
        else:
            result = config.method.run(base, _formed(base, tuned), options)
    if base.is_floating_point():
        result.weight = stored(result.weight, out_dtype or stored_dtype(config, base.dtype), label)
    report = result.report
    report.method, report.treatment, report.reason = config.method.name, plan.kind, plan.reason
    report.shape = tuple(base.shape)
    if plan.kind != "base" and (config.method.matrices_only if measure_norms is None else measure_norms):
        dense = [model for model in tuned if isinstance(model, Tensor)]
        *distances, report.update_norm = _distances(base, [*dense, result.weight])
        found = iter(distances)
        report.task_norms = [model.norm() if isinstance(model, Factored) else next(found) for model in tuned]
    return result


def merge_state_dicts(
    base: Mapping[str, Tensor], tuned: Sequence[Mapping[str, Tensor]], config: MergeConfig
) -> StateDictResult:
    """Merge T fine-tuned state dicts into the base's, tensor by tensor.

    Tied tensors, which are copies of one another in the base and in every fine-tune (`tied_names`), are merged once,
    with one random mask, and stay tied: a copy has the result of the first name, and shares its memory if it does so in
    the base. Where the config has other parameters for its name, it is merged as a tensor of its own.

    Args:
        base: name to tensor.
        tuned: T state dicts with the same names and shapes.
        config: method and parameters. If it lists models, there must be T.

    Raises:
        CheckpointError: the names are not the same everywhere.
        QuantisedRefused: a model is quantised.
        As `merge_tensors`, with the tensor's name in the message.
    """
    refuse_quantised("base", base)
    for index, state_dict in enumerate(tuned):
        refuse_quantised(f"tuned[{index}]", state_dict)
        check_same_names(base, state_dict, f"tuned[{index}]")
    if config.base_joins:
        config, tuned = config.with_base_listed(), [*tuned, base]
    positions, tied = layer_positions(base), tied_names(base, tuned)
    merged: dict[str, Tensor] = {}
    reports: dict[str, TensorReport] = {}

    def rule(name: str, tensor: Tensor, original: str) -> tuple[MethodParameters, Treatment]:
        options = config.options(len(tuned), name, positions[name], seeded_by=original)
        return options, treatment(config, options, name, tuple(tensor.shape), tensor.dtype, len(tuned))

    for name, tensor in base.items():
        first = tied.get(name)
        if first is not None and rule(name, tensor, first) == rule(first, tensor, first):
            merged[name] = merged[first] if same_memory(tensor, base[first]) else merged[first].clone()
            reports[name] = replace(reports[first], reason=f"tied to {first}", seconds=0.0, stages={})
            continue
        result = merge_tensors(
            tensor, [state_dict[name] for state_dict in tuned], config, name=name, position=positions[name]
        )
        merged[name], reports[name] = result.weight, result.report
    return StateDictResult(merged, reports)


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
        raise DTypeError(f"{name}: {dtype} cannot be merged; convert the checkpoint to bfloat16")
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
    base: Tensor, tuned: Sequence[Tensor | Factored], config: MergeConfig, label: str
) -> tuple[Tensor, list[Tensor | Factored]]:
    """Round the inputs to the config's dtype, after refusing any that do not match or are not finite."""
    check_group(base, [base if isinstance(model, Factored) else model for model in tuned], op=label)
    dtype = None if config.dtype is None else getattr(torch, config.dtype)

    def loaded(tensor: Tensor, owner: str) -> Tensor:
        rounded = tensor if dtype is None else tensor.to(dtype)
        check_finite(rounded, f"{label} of {owner}")
        return rounded

    start, models = loaded(base, "the base"), list[Tensor | Factored]()
    for owner, model in zip(_owners(config, len(tuned)), tuned, strict=True):
        if isinstance(model, Factored):
            _check_factored(base, model, f"{label} of {owner}")
            models.append(model)
        else:
            models.append(loaded(model, owner))
    return start, models


def _check_factored(base: Tensor, update: Factored, label: str) -> None:
    if update.shape != tuple(base.shape):
        raise ShapeError(f"{label}: the update has shape {update.shape}, the base {tuple(base.shape)}")
    if update.left.device != base.device:
        raise DeviceError(f"{label}: the update lies on {update.left.device}, the base on {base.device}")
    for factor in (update.left, update.right):
        check_finite(factor, label)


def _formed(base: Tensor, tuned: Sequence[Tensor | Factored]) -> list[Tensor]:
    """Return the tuned tensors, forming those that are given as updates: float32, or float64 if anything is."""
    return [base_plus(base, model) if isinstance(model, Factored) else model for model in tuned]


def base_plus(base: Tensor, update: Factored) -> Tensor:
    """Return ``base + update`` in the dtype that task vectors are formed in; the base itself if there is no update."""
    if not update.left.shape[1]:
        return base
    dtype = accumulation_dtype(base, update.left)
    return torch.addmm(base.to(dtype), update.left.to(dtype) * update.scale, update.right.to(dtype))


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
    """Round to the storage dtype; a finite value that overflows it is an error, not an infinity."""
    if weight.dtype == dtype:
        return weight
    stored = weight.to(dtype)
    if weight.numel() == 0 or all(bool(bound.isfinite()) for bound in stored.aminmax()):
        return stored
    if bool((stored.isinf() & weight.isfinite()).any()):
        largest = float(weight.abs().amax())
        raise NonFiniteError(
            f"{label}: a merged value of magnitude {largest:.3g} does not fit {str(dtype).removeprefix('torch.')}; "
            "choose a wider out_dtype or a smaller alpha"
        )
    return stored


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
