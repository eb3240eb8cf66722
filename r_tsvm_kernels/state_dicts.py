"""Merge state dicts and modules in memory."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from .config import MergeConfig, as_config, as_dtype
from .errors import ConfigError, DTypeError
from .merge import merge_tensors
from .methods import MethodParameters, TensorReport
from .missing import base_or_first, mean_of_present, without_base
from .ops._checks import FLOAT_DTYPES, check_list
from .parameters import layer_positions
from .quantised import refuse_quantised
from .text import dtype_name
from .tied import same_memory, tied_names
from .treatments import Treatment, check_same_names, is_computed, is_excluded, stored_dtype, treatment
from .values import detached

_LOG = logging.getLogger(__name__)

_MISSING = "missing in some models"

Module = TypeVar("Module", bound=nn.Module)
StateDict = Mapping[str, Tensor]


@dataclass(frozen=True, repr=False)
class StateDictResult:
    """A merged state dict, and a report for each tensor.

    Attributes:
        state_dict: name to merged tensor, in the order of the base.
        reports: name to report, in the same order.

    Examples:
        >>> merge_state_dicts({"w": torch.zeros(2)}, [{"w": torch.ones(2)}], "linear")
        StateDictResult(1 tensor, linear)
    """

    state_dict: dict[str, Tensor]
    reports: dict[str, TensorReport]

    def __repr__(self) -> str:
        return f"StateDictResult({summary(self.reports)})"


def summary(reports: Mapping[str, TensorReport]) -> str:
    """Return a short text: how many tensors were merged, how, and how accurately."""
    parts = [
        f"{len(reports)} tensor{'s' * (len(reports) != 1)}",
        *dict.fromkeys(report.method for report in reports.values()),
    ]
    for kind, words in (("mean", "by the mean task vector"), ("base", "the base's")):
        count = sum(report.treatment == kind for report in reports.values())
        parts += [f"{count} {words}"] if count else []
    errors = [report.certificate.error for report in reports.values() if report.certificate is not None]
    return ", ".join([*parts, *([f"largest error {max(errors):.1g}"] if errors else [])])


def merge_state_dicts(
    base: StateDict | nn.Module | None,
    tuned: Sequence[StateDict | nn.Module],
    config: MergeConfig | str,
    *,
    out_dtype: torch.dtype | str | None = None,
    **parameters: Any,
) -> StateDictResult:
    """Merge T fine-tuned state dicts into the base's, tensor by tensor.

    Tied tensors, which are copies of one another in the base and in every fine-tune (`tied_names`), are merged once,
    with one random mask, and stay tied: a copy gets the result of its original, and shares its memory if it does so in
    the base. If the config has other parameters for its name, it is merged separately.

    Memory: the result is one more copy of the base. Beside it, only one tensor is processed at a time.

    Args:
        base: state dict, as of ``model.state_dict()`` or ``dict(model.named_parameters())``, or a module, whose state
            dict is taken; None for a method that needs no base (`linear`, `karcher`).
        tuned: T state dicts or modules with the same names and shapes. Tensors that the config excludes keep the base's
            value: they may be missing or have another shape, and those that the base lacks are dropped. ``missing`` of
            the config says what becomes of others that only some have.
        config: name of a method, or a `MergeConfig`. If it lists models, there must be T.
        out_dtype: dtype of the floating-point tensors of the result, as in `merge_tensors`.
        parameters: parameters of the method, and other fields of `MergeConfig` such as ``exclude``, if `config` is a
            name.

    Returns:
        StateDictResult: new tensors without a graph, on the devices of the base, and a report for each.

    Raises:
        CheckpointError: the names differ.
        ConfigError: no such method or parameter, or a pattern of the config matches no name.
        DTypeError: an argument is neither a state dict nor a module.
        QuantisedRefusedError: a model is quantised.
        ShapeError: shapes differ; other errors as for `merge_tensors`, with the tensor's name in the message.

    Examples:
        >>> base, math, code = (torch.nn.Linear(3, 2) for _ in range(3))
        >>> merged = merge_state_dicts(base, [math, code], "ties", weight=[1.0, 0.5], density=0.2)
        >>> base.load_state_dict(merged.state_dict)
        <All keys matched successfully>
    """
    config = as_config(config, parameters)
    if out_dtype is not None:
        config = config.model_copy(update={"out_dtype": dtype_name(as_dtype(out_dtype))})
    if config.requantise:
        raise ConfigError("requantise: state dicts are returned as values; use merge_checkpoints, or leave it out")
    if config.vocabulary is not None:
        raise ConfigError("vocabulary: state dicts have no tokenizers; use merge_checkpoints, or leave it out")
    check_list(tuned, "state dicts or modules", "tuned")
    models = [_state_dict(given, f"tuned[{index}]") for index, given in enumerate(tuned)]
    config = without_base(config) if base is None else config
    start = _state_dict(base_or_first(base, models, config), "the base")
    refuse_quantised("base", start)
    for index, state_dict in enumerate(models):
        refuse_quantised(f"tuned[{index}]", state_dict)
        check_same_names(start, state_dict, f"tuned[{index}]", config)
    config.check_patterns({name for state_dict in (start, *models) for name in state_dict})
    if config.base_joins:
        config, models = config.with_base_listed(), [*models, start]
    extra = _extra_tensors(start, models, config)
    positions, tied = layer_positions([*start, *extra]), tied_names(start, models)
    shapes = {name: tuple(tensor.shape) for name, tensor in start.items()}
    splits = config.splits(shapes, _model_config(base))
    merged: dict[str, Tensor] = {}
    reports: dict[str, TensorReport] = {}

    def rule(name: str, tensor: Tensor, original: str) -> tuple[MethodParameters, Treatment]:
        options = config.options(len(models), name, positions[name], seeded_by=original)
        return options, treatment(config, options, name, tuple(tensor.shape), tensor.dtype, len(models))

    for name in sorted(start, key=tied.__contains__):  # copies last
        tensor, original = start[name], tied.get(name)
        if original is not None and rule(name, tensor, original) == rule(original, tensor, original):
            merged[name] = merged[original] if same_memory(tensor, start[original]) else merged[original].clone()
            reason = reports[original].reason or f"tied to {original}"
            reports[name] = replace(reports[original], reason=reason, seconds=0.0, stages={})
            continue
        own = [state_dict[name] for state_dict in models if name in state_dict]
        decided = rule(name, tensor, name)[1]
        if len(own) == len(models) or decided.kind == "base":
            # An excluded tensor may be missing; its value is the base's.
            own = own + [tensor] * (len(models) - len(own))
            blocks = config.blocks(name, shapes[name], shapes.get, splits)
            result = merge_tensors(tensor, own, config, name=name, position=positions[name], blocks=blocks)
        elif own and config.missing == "mean_of_present":
            result = mean_of_present(own, config, _MISSING, name=name, out_dtype=stored_dtype(config, tensor.dtype))
        else:
            result = mean_of_present([tensor], config, _MISSING, name=name)
            result.report.treatment = "base"
        merged[name], reports[name] = result.weight, result.report
    for name, values in extra.items():
        result = mean_of_present(values, config, _MISSING, name=name)
        merged[name], reports[name] = result.weight, result.report
    order = [*start, *extra]
    found = StateDictResult({name: merged[name] for name in order}, {name: reports[name] for name in order})
    _LOG.info("merged %s in %.3g s", summary(found.reports), math.fsum(report.seconds for report in reports.values()))
    return found


def _extra_tensors(
    start: Mapping[str, Tensor], models: Sequence[Mapping[str, Tensor]], config: MergeConfig
) -> dict[str, list[Tensor]]:
    """Return the values of tensors that the base lacks and that its policy for missing tensors adds to the result."""
    found: dict[str, list[Tensor]] = {}
    for name, tensor in ((name, tensor) for state_dict in models for name, tensor in state_dict.items()):
        wanted = config.missing == "mean_of_present" and name not in start and not is_excluded(config, name)
        if wanted and not is_computed(name) and tensor.dtype in FLOAT_DTYPES and tensor.numel():
            found.setdefault(name, []).append(tensor)
    return found


def merge_models(
    base: Module,
    tuned: Sequence[nn.Module],
    config: MergeConfig | str,
    *,
    out_dtype: torch.dtype | str | None = None,
    **parameters: Any,
) -> Module:
    """Merge T fine-tuned modules into a new module of the base's class.

    The new module is a deep copy of the base with merged parameters and buffers: structure, configuration, tied
    parameters, dtypes, devices, ``requires_grad``, and train or eval mode are the base's; gradients are not copied. The
    modules given stay unchanged. Buffers that are not part of the state dict are copies of the base's.

    Memory: all modules are in memory, and the result is one more copy of the base; nothing is copied twice.
    `merge_checkpoints` merges models that do not fit.

    Args:
        base: the module that the others were fine-tuned from, such as a model of transformers.
        tuned: T modules whose state dicts have the names and shapes of the base's.
        config: name of a method, or a `MergeConfig`.
        out_dtype: dtype of the floating-point parameters and buffers of the result; None keeps the base's.
        parameters: parameters of the method, if `config` is a name: see `MergeConfig`.

    Returns:
        The merged module.

    Raises:
        DTypeError: an argument is not a module.
        ConfigError: names that share one parameter in the base get different values, because a fine-tune does not
            share it or the config treats the names differently; or the base builds its state dict itself.
        CheckpointError: the names differ; other errors as for `merge_state_dicts`.

    Examples:
        >>> base, math, code = (torch.nn.Linear(3, 2) for _ in range(3))
        >>> merged = merge_models(base, [math, code], "task_arithmetic", alpha=0.5)
        >>> merged.weight.requires_grad
        True
    """
    check_list(tuned, "modules", "tuned")
    for label, module in [("the base", base), *((f"tuned[{index}]", module) for index, module in enumerate(tuned))]:
        if not isinstance(module, nn.Module):
            raise DTypeError(f"{label}: expected a torch.nn.Module, got {type(module).__name__}")
    values = merge_state_dicts(base, tuned, config, out_dtype=out_dtype, **parameters).state_dict
    tensors = base.state_dict(keep_vars=True)
    own = {id(tensor) for tensor in (*base.parameters(), *base.buffers())}
    if foreign := [name for name, tensor in tensors.items() if id(tensor) not in own]:
        raise ConfigError(
            f"{type(base).__name__}: {foreign[0]} of its state dict is none of its parameters or buffers, so a copy "
            "cannot be given a merged one; use merge_state_dicts and load_state_dict"
        )
    copies: dict[int, object] = {}  # what the deep copy has in place of each tensor of the base
    for name, tensor in tensors.items():
        value = values[name]
        if (earlier := copies.get(id(tensor))) is not None:
            _check_tied(name, value, cast(Tensor, earlier))
            continue
        copies[id(tensor)] = (
            nn.Parameter(value, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value
        )
    return copy.deepcopy(base, copies)


def _check_tied(name: str, value: Tensor, earlier: Tensor) -> None:
    """Require that all names of a shared parameter have the same value."""
    if value.dtype in FLOAT_DTYPES and value.numel() and not same_memory(value, earlier):
        raise ConfigError(
            f"{name} is a tied parameter of the base, but a fine-tune does not tie it or the config treats its names "
            "differently, so it has two merged values; use merge_state_dicts, which returns both"
        )


def _model_config(model: object) -> Mapping[str, Any]:
    """Return the configuration of a model of transformers; empty for anything else."""
    to_dict = getattr(getattr(model, "config", None), "to_dict", None)
    found = to_dict() if isinstance(model, nn.Module) and callable(to_dict) else {}
    return found if isinstance(found, Mapping) else {}


def _state_dict(given: object, label: str) -> dict[str, Tensor]:
    """Return a state dict of plain tensors, see `detached`.

    Raises:
        DTypeError: it is neither a state dict nor a module, or holds a value that cannot be merged.
        DeviceError: a tensor is on the meta device.
    """
    if isinstance(given, nn.Module):
        given = given.state_dict()
    if not isinstance(given, Mapping):
        raise DTypeError(f"{label}: expected a state dict or a module, got {type(given).__name__}")
    if odd := [name for name in given if not isinstance(name, str)]:
        raise DTypeError(f"{label}: expected names of tensors as keys, got {odd[0]!r}")
    return {name: detached(tensor, f"{name} of {label}") for name, tensor in given.items()}
