"""Merge tensors in memory, one at a time."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .blocks import WHOLE, Blocks
from .config import MergeConfig, as_config, as_dtype
from .dispatch import ops, prepare
from .errors import ConfigError, NonFiniteError, RtsvmError
from .foreign_devices import on_own_device
from .linalg import Factored
from .methods import (
    MergeResult,
    MethodParameters,
    Summands,
    TensorJob,
    TensorReport,
    calibrate_update,
    get_method,
    mean_task_vector,
    of_tensor,
    task_matrices,
    timed,
)
from .missing import base_or_first, without_base
from .ops._checks import accumulation_dtype, check_group, check_list, is_finite
from .text import some
from .treatments import Treatment, stored_dtype, treatment
from .values import (
    check_agreement,
    check_factored,
    check_options,
    checked_inputs,
    detached,
    distances,
    formed,
    overflow,
    stored,
)

_LOG = logging.getLogger(__name__)

# Spectral methods square the norms of weighted task matrices, in float64: the largest norm, with a margin.
_LARGEST_NORM = 1e150


@on_own_device
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
    blocks: Blocks | None = None,
    **parameters: Any,
) -> MergeResult:
    """Merge T fine-tuned versions of one tensor into its base.

    Args:
        base: the tensor that the others were fine-tuned from; None for a method that needs none (`linear`, `karcher`).
            float64, float32, float16 or bfloat16. Spectral methods apply to (m, n) matrices, also to each of several
            packed experts (E, m, n), which the name tells; tensors of any other rank get the mean task vector. Integer
            and bool tensors are returned unchanged, see `QuantisedRefusedError`.
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
        blocks: how the tensor is divided into matrices, each merged alone; None: by its name and shape.
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
    config = without_base(config) if base is None else config
    base = base_or_first(base, tuned, config)
    base = detached(base, f"{label} of the base")
    prepare(ops() if config.method.ops is None else config.method.ops, base.device.type)
    with timed(stages, "merge"), torch.no_grad():
        result = _merged(base, tuned, config, name, position, seeded_by, dtype, measure_norms, blocks)
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
    blocks: Blocks | None,
) -> MergeResult:
    if config.base_joins:
        config, tuned = config.with_base_listed(), [*tuned, base]
    if config.method.copies is not None and not base.is_floating_point() and isinstance(tuned[0], Tensor):
        base = tuned[0]  # buffers are those of the model
    shape = tuple(base.shape)
    if blocks is None:
        blocks = config.blocks(name, shape, lambda other: None, config.splits({name: shape}) if config.split else {})
    seed = name if seeded_by is None else seeded_by
    one = _Merge(base, tuned, config, name, name or "tensor", position, seed, out_dtype, measure_norms)
    decided = treatment(config, one.options, name, shape, base.dtype, len(tuned), blocks)
    if decided.kind != "merge" or not blocks.divide or config.row_wise:
        return one.run(decided)
    check_group(base, [base if isinstance(model, Factored) else model for model in tuned], op=one.label)
    for model in tuned:
        if isinstance(model, Factored):
            check_factored(base, model, one.label)
    weight = torch.empty(shape, dtype=out_dtype or stored_dtype(config, base.dtype), device=base.device)
    divided = [_divided(blocks, model) for model in (base, *tuned)]
    merges = [
        replace(one, base=own[0][1], tuned=[model for _, model in own[1:]], label=one.label + own[0][0],
                seed=seed + own[0][0])
        for own in zip(*divided, strict=True)
    ]  # fmt: skip
    reports, places = list[TensorReport](), blocks.of(weight)
    size = config.method.batch(job_of(blocks.largest(shape), base, tuned), one.options)
    for first in range(0, len(merges), size):
        for result in _run_batch(merges[first : first + size]):
            places[len(reports)][1].copy_(result.weight)
            reports.append(result.report)
    report = TensorReport.of_blocks(reports, [label for label, _ in divided[0]])
    report.treatment, report.reason, report.shape = decided.kind, decided.reason, shape
    return MergeResult(weight, report)


@dataclass(frozen=True)
class BatchMember:
    """One matrix of a batch, see `merge_batch`; the fields are arguments of `merge_tensors`."""

    base: Tensor
    tuned: Sequence[Tensor | Factored]
    name: str
    position: float = 0.0
    out_dtype: torch.dtype | None = None


def merge_batch(
    members: Sequence[BatchMember], config: MergeConfig, *, measure_norms: bool | None = None
) -> list[MergeResult]:
    """Merge matrices of several tensors in one batch of the method, `Method.run_batch`.

    The last bits of a result depend on the other matrices of its batch: the worst conditioned one decides how many
    steps all of them take, and libraries round products of batches differently.

    Args:
        members: matrices of one shape, with equal dtypes, treatment and options.
        config: of a method that has batches.
        measure_norms: as for `merge_tensors`.

    Returns:
        One result for each member, with an equal share of the time.

    Raises:
        ShapeError, DTypeError, NonFiniteError, ConfigError, ConvergenceError: as `merge_tensors`; an error that cannot
            be told apart names the first members.

    Examples:
        >>> zeros = torch.zeros(20, 30)
        >>> tuned = [torch.randn(20, 30, generator=torch.Generator().manual_seed(t)) for t in range(4)]
        >>> members = [BatchMember(zeros, tuned[:2], "k"), BatchMember(zeros, tuned[2:], "v")]
        >>> [result.report.ranks for result in merge_batch(members, MergeConfig("tsvm", solver="products"))]
        [[10, 10], [10, 10]]
    """
    prepare(ops() if config.method.ops is None else config.method.ops, members[0].base.device.type)
    stages = dict[str, list[float]]()
    merges = [
        _Merge(own.base, own.tuned, config, own.name, own.name, own.position, own.name, own.out_dtype, measure_norms)
        for own in members
    ]
    with timed(stages, "merge"), torch.no_grad():
        results = _run_batch(merges)
        for result in results:
            result.weight = result.weight.contiguous()
    for result in results:
        result.report.stages["merge"] = [seconds / len(results) for seconds in stages["merge"]]
        result.report.seconds = result.report.stages["merge"][0]
    return results


def summands_of(
    base: Tensor,
    tuned: Sequence[Tensor | Factored],
    config: MergeConfig,
    *,
    name: str = "",
    position: float = 0.0,
    blocks: Blocks | None = None,
) -> Summands:
    """Return the summands of the merge of one tensor, see `Summands`; they do not depend on the weights and alpha.

    Args:
        base: as for `merge_tensors`.
        tuned: as for `merge_tensors`.
        config: of a method whose merge is linear in the weights.
        name: as for `merge_tensors`.
        position: as for `merge_tensors`.
        blocks: as for `merge_tensors`.

    Returns:
        T parts of the shape of the base, in float32 (float64 if an input is); none if the base's value stays. Parts of
        matrices may be factored.

    Raises:
        ShapeError, DeviceError, DTypeError, QuantisedRefusedError, NonFiniteError, ConfigError, ConvergenceError: as
            `merge_tensors`.
    """
    shape, label, stages = tuple(base.shape), name or "tensor", dict[str, list[float]]()
    blocks = config.blocks(name, shape, lambda other: None, {}) if blocks is None else blocks
    one = _Merge(base, tuned, config, name, label, position, name, torch.float32, True)
    decided = treatment(config, one.options, name, shape, base.dtype, len(tuned), blocks)
    with timed(stages, "merge"), torch.no_grad():
        if decided.kind != "merge" or not blocks.divide:
            found = one.summands(decided)
        else:
            divided = [_divided(blocks, model) for model in (base, *tuned)]
            found = _of_blocks(
                [
                    replace(one, base=own[0][1], tuned=[model for _, model in own[1:]], label=one.label + own[0][0])
                    for own in zip(*divided, strict=True)
                ],
                blocks,
                decided,
                base,
                [label for label, _ in divided[0]],
            )
    found.report.stages |= stages
    found.report.seconds = stages["merge"][0]
    return found


def _of_blocks(
    merges: Sequence[_Merge], blocks: Blocks, decided: Treatment, base: Tensor, labels: Sequence[str]
) -> Summands:
    """Return the summands of a tensor from those of its blocks."""
    parts = list[Tensor]()
    places, reports, errors = [list[Tensor]() for _ in merges[0].tuned], list[TensorReport](), list[float]()
    for index, merge in enumerate(merges):
        found = merge.summands(merge.decided)
        if not parts:
            dtype = accumulation_dtype(
                base, *(model.left if isinstance(model, Factored) else model for model in merge.tuned)
            )
            parts = [torch.zeros(base.shape, dtype=dtype, device=base.device) for _ in merge.tuned]
            places = [[place for _, place in blocks.of(part)] for part in parts]
        for own, part in zip(places, found.parts, strict=True):
            own[index].copy_(part.dense() if isinstance(part, Factored) else part)
        reports.append(found.report)
        errors.append(found.error)
    report = TensorReport.of_blocks(reports, labels)
    report.treatment, report.reason, report.shape = decided.kind, decided.reason, tuple(base.shape)
    return Summands([*parts], report, math.hypot(*errors))


def _divided(blocks: Blocks, model: Tensor | Factored) -> list[tuple[str, Tensor | Factored]]:
    """Return the blocks of a tensor, or of an update of a matrix."""
    if isinstance(model, Tensor):
        return [*blocks.of(model)]
    if not blocks.sizes:
        return [("", model)]
    factor, axis = ("left", 0) if blocks.axis == 0 else ("right", 1)
    parts = [getattr(model, factor).narrow(axis, *part) for part in blocks.ranges()]
    return [("", replace(model, **{factor: part})) for part in parts]


def job_of(shape: tuple[int, ...], base: Tensor, tuned: Sequence[Tensor | Factored]) -> TensorJob:
    """Return the description of a merge of tensors of this shape, of the dtypes and on the device of these."""
    models = (model.left if isinstance(model, Factored) else model for model in tuned)
    return TensorJob(shape, len(tuned), accumulation_dtype(base, *models).itemsize, base.device.type)


@dataclass(frozen=True)
class _Merge:
    """The merge of one matrix, or of one tensor of another rank."""

    base: Tensor
    tuned: Sequence[Tensor | Factored]
    config: MergeConfig
    name: str
    label: str
    position: float
    seed: str
    out_dtype: torch.dtype | None
    measure_norms: bool | None

    @cached_property
    def options(self) -> MethodParameters:
        """The parameters of the method for this tensor."""
        return self.config.options(len(self.tuned), self.name, self.position, seeded_by=self.seed)

    @property
    def decided(self) -> Treatment:
        """The treatment of a block, which may have fewer rows than the others."""
        shape = tuple(self.base.shape)
        return treatment(self.config, self.options, self.name, shape, self.base.dtype, len(self.tuned), WHOLE)

    def run(self, decided: Treatment) -> MergeResult:
        """Check the inputs, merge and store."""
        if decided.kind == "base":
            check_agreement(self.base, self.tuned, self.config, decided.excluded, self.label)
            return self.finished(MergeResult(self.base.clone(), TensorReport()), decided)
        checked = self.checked(decided)
        rounded = checked.rounding(decided.kind)
        with _named(self.label):
            result = checked.computed(decided.kind, rounded)
        try:
            return checked.finished(result, decided)
        except NonFiniteError:
            if rounded is None:
                raise
            with _named(self.label):  # again, not rounded: the message says which value does not fit
                return checked.finished(checked.computed(decided.kind), decided)

    def checked(self, decided: Treatment) -> _Merge:
        """Return the merge of the inputs as they are loaded, after checks."""
        config, options = self.config, self.options
        differences = decided.kind == "mean" or config.method.forms_vectors(getattr(options, "relative", False))
        limit = math.inf
        if config.method.matrices_only and decided.kind == "merge":
            limit = _LARGEST_NORM / math.sqrt(self.base.numel()) / max(1.0, *map(abs, options.weight))
        base, tuned = checked_inputs(self.base, self.tuned, config, self.label, limit if differences else None)
        dtype = accumulation_dtype(base, *(model.left if isinstance(model, Factored) else model for model in tuned))
        check_options(options, dtype, self.label)
        return replace(self, base=base, tuned=tuned)

    def rounding(self, kind: str) -> torch.dtype | None:
        """Return the dtype that the method may round its result to: the output's, if nothing else is done to it."""
        rounds = self.config.method.rounds or kind == "mean"
        if not rounds or self.config.calibrate is not None or not self.base.is_floating_point():
            return None
        return self.out_dtype or stored_dtype(self.config, self.base.dtype)

    def computed(self, kind: str, out_dtype: torch.dtype | None = None) -> MergeResult:
        """Merge by the method or by the mean; the result is in the dtype of the computation, or in `out_dtype`."""
        with of_tensor(self.label):
            return self._computed(kind, out_dtype)

    def _computed(self, kind: str, out_dtype: torch.dtype | None) -> MergeResult:
        method, options = self.config.method, self.options
        if kind != "mean":
            factored = method.factored(options) and all(isinstance(model, Factored) for model in self.tuned)
            models = self.tuned if factored else formed(self.base, self.tuned, self.label)
            return method.run(self.base, models, options, **({"out_dtype": out_dtype} if method.rounds else {}))
        models = formed(self.base, self.tuned, self.label)
        if method.needs_base:
            return mean_task_vector(self.base, models, options.weight, getattr(options, "alpha", 1.0), out_dtype)
        linear = get_method("linear")
        return linear.run(self.base, models, linear.parameters(weight=options.weight), out_dtype=out_dtype)

    def summands(self, decided: Treatment) -> Summands:
        """Check the inputs, and return the summands of the merge with their norms."""
        if decided.kind == "base":
            check_agreement(self.base, self.tuned, self.config, decided.excluded, self.label)
            return Summands([], TensorReport(self.config.method.name, "base", decided.reason, tuple(self.base.shape)))
        checked, method = self.checked(decided), self.config.method
        ones = self.options.model_copy(update={"weight": (1.0,) * len(self.tuned)})
        base, tuned = checked.base, checked.tuned
        factored = method.factored(ones) and all(isinstance(model, Factored) for model in tuned)
        models = tuned if factored and decided.kind == "merge" else formed(base, tuned, self.label)
        with _named(self.label):
            if decided.kind == "mean":
                matrices = task_matrices(base, models)[0]
                parts = [matrix / len(models) for matrix in matrices if isinstance(matrix, Tensor)]
                found = Summands([*parts], TensorReport(weights=[1.0] * len(models)))
            else:
                assert method.linear is not None
                found = method.linear.run(base, models, ones)
        report = found.report
        report.method, report.treatment, report.reason = method.name, decided.kind, decided.reason
        report.shape = tuple(base.shape)
        dense = [model for model in tuned if isinstance(model, Tensor)]
        norms = iter(distances(base, dense) if dense else ())
        report.task_norms = [model.norm() if isinstance(model, Factored) else next(norms) for model in tuned]
        return found

    def finished(self, result: MergeResult, decided: Treatment) -> MergeResult:
        """Store the result in its dtype, and complete its report."""
        base, config, label = self.base, self.config, self.label
        if config.calibrate is not None and decided.kind == "merge" and base.ndim == 2:
            with _named(label), timed(result.report.stages, "calibrate"):
                result.weight = calibrate_update(base, self.tuned, result.weight, config.calibrate_floor)
            result.report.certificate = None  # that of the merge does not hold for it
        if base.is_floating_point():
            wide = result.weight
            result.weight = stored(wide, self.out_dtype or stored_dtype(config, base.dtype), label)
            if decided.kind != "base" and not is_finite(result.weight):
                raise NonFiniteError(overflow(wide, self.options, label))
        report = result.report
        report.method, report.treatment, report.reason = config.method.name, decided.kind, decided.reason
        report.shape = tuple(base.shape)
        measure = config.method.matrices_only if self.measure_norms is None else self.measure_norms
        if decided.kind != "base" and measure:
            dense = [model for model in self.tuned if isinstance(model, Tensor)]
            *norms, report.update_norm = distances(base, [*dense, result.weight])
            found = iter(norms)
            report.task_norms = [model.norm() if isinstance(model, Factored) else next(found) for model in self.tuned]
        return result


def _run_batch(merges: Sequence[_Merge]) -> list[MergeResult]:
    """Merge several matrices, in one batch if the method has batches; those that it cannot merge get the mean."""
    decisions = [merge.decided for merge in merges]
    batch, decided = merges[0].config.method.run_batch, decisions[0]
    if batch is None or len(merges) == 1 or any(own.kind != "merge" for own in decisions):
        return [merge.run(own) for merge, own in zip(merges, decisions, strict=True)]
    checked = [merge.checked(decided) for merge in merges]
    models = [formed(merge.base, merge.tuned, merge.label) for merge in checked]

    def computed(out_dtype: torch.dtype | None) -> list[MergeResult]:
        with _named(some([merge.label for merge in checked])):
            results = batch([merge.base for merge in checked], models, checked[0].options, out_dtype)
        return [merge.finished(result, decided) for merge, result in zip(checked, results, strict=True)]

    rounded = checked[0].rounding(decided.kind)
    try:
        return computed(rounded)
    except NonFiniteError:
        if rounded is None:
            raise
        return computed(None)  # again, not rounded: the message says which value does not fit


@contextmanager
def _named(label: str) -> Iterator[None]:
    """Prefix errors with the name of the tensor, unless they have it."""
    try:
        yield
    except RtsvmError as error:
        if label in str(error):
            raise
        raise type(error)(f"{label}: {error}") from error
