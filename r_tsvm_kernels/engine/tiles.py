"""Read and merge one tile, some rows of one tensor: the unit of work of every engine.

Most tensors are one tile; those whose rows can be merged separately are cut into several (`scheduling`). Matrices of
several tensors may be merged in one batch (`plan.batches`), whatever the order or the number of workers. A tile is
merged with one torch thread, because BLAS and LAPACK round differently with more. The result then has the same bits for
any order, any number of workers, and any other work beside it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import Checkpoint, Checksum, TensorHeader, first_scale_row, requantise
from ..errors import CheckpointError
from ..linalg import Factored
from ..lora import Adapter, Change
from ..lora.adapted_model import AdaptedModel
from ..lora.task_part import Added, TaskPart
from ..merge import BatchMember, merge_batch, merge_tensors, summands_of
from ..methods import MergeResult, TensorReport, timed
from ..missing import mean_of_present
from ..parts import merge_parts, store_parts
from ..plan import MergePlan, TensorPlan
from ..quantised import differing_error, must_agree, same_values
from ..text import dtype_name
from ..values import base_plus, stored
from .aligned_rows import read_aligned, restore_untouched
from .journal import Finished, Stored
from .scheduling import TensorSchedule
from .shards import Shards

# A tensor, or what an adapter does to one.
Values = Tensor | Factored | Change

_LOG = logging.getLogger(__name__)

# Rows of tied heads and embeddings are compared in pieces of about this size.
_PIECE_BYTES = 64 << 20


@dataclass(frozen=True)
class Tile:
    """Rows `first` to `last` (exclusive) of a tensor; all rows if the tensor is not cut."""

    name: str
    index: int
    count: int
    first: int
    last: int

    @property
    def is_last(self) -> bool:
        """Whether this is the last tile of the tensor."""
        return self.index + 1 == self.count


def tiles_of(group: Sequence[str], schedules: Mapping[str, TensorSchedule]) -> Iterator[tuple[Tile, ...]]:
    """Yield what is merged at a time: the tiles of a tensor one by one, in order; or a group of whole tensors."""
    if len(group) > 1:
        yield tuple(Tile(name, 0, 1, 0, schedules[name].rows) for name in group)
        return
    for name in group:
        for index, (first, last) in enumerate(schedules[name].tiles):
            yield (Tile(name, index, schedules[name].count, first, last),)


# Calls a function with the items of lists, one call for each position, and returns what they returned.
Each = Callable[..., Iterable[Any]]


def read_tile(plan: MergePlan, tile: Tile, *, pin: bool = False, each: Each = map) -> list[Values]:
    """Read a tile of every input that has a part of the tensor, the base first. Adapters give their factors.

    Args:
        plan: the plan.
        tile: what to read.
        pin: into memory that a GPU copies from without a wait.
        each: reads the inputs, one after the other or at once.

    Raises:
        InputChangedError, CheckpointError: an input cannot be read, or has changed.
    """
    plan = plan.section(tile.name)
    if plan.tensors[tile.name].aligned:
        return read_aligned(plan, tile.name, tile.first, tile.last, pin=pin)
    rows = None if tile.count == 1 else (tile.first, tile.last)
    sources = [plan.inputs[part.source] for part in plan.tensors[tile.name].parts]

    def read(source: Checkpoint | Adapter) -> Values:
        if isinstance(source, TaskPart):
            # The engine has the checksums of matrices, which may be read in pieces: see `check_parts`.
            return source.part(tile.name, rows=rows, pin=pin, check=source.is_product(tile.name))
        if isinstance(source, Adapter):
            return source.load_change(plan.module(source, tile.name), pin=pin)  # never cut: see `MergePlan.row_wise`
        return source.load(tile.name, rows=rows, pin=pin)

    return list(each(read, sources))


def update_checksum(checksum: Checksum, values: Values) -> None:
    """Add a tensor, or both factors of an update, to a checksum."""
    if isinstance(values, Tensor):
        tensors: tuple[Tensor, ...] = (values,)
    else:
        tensors = (values.left, values.right) if isinstance(values, Factored) else values.tensors
    for tensor in tensors:
        checksum.update(tensor.contiguous())


def checksums_by_input(plan: MergePlan, name: str, checksums: Sequence[Checksum]) -> list[str]:
    """Return one checksum per input, up to the last input that has a part of the tensor; empty for those without.

    Tensors whose rows were aligned are read once more for it, because their rows were read in another order.
    """
    plan = plan.section(name)
    found = {part.source: sums.hexdigest() for part, sums in zip(plan.tensors[name].parts, checksums, strict=True)}
    if plan.tensors[name].aligned:
        sources = ((source, plan.inputs[source]) for source in found)
        found |= {source: model.checksum(name) for source, model in sources if isinstance(model, Checkpoint)}
    return [found.get(source, "") for source in range(max(found) + 1)]


def check_parts(plan: MergePlan, name: str, checksums: Sequence[str]) -> None:
    """Check that a tensor of the base is the one that parts were made for, and that the parts are those.

    Args:
        plan: the plan.
        name: of the tensor.
        checksums: of its inputs, see `checksums_by_input`.

    Raises:
        CheckpointError: one is another.
    """
    if plan.parts is not None:
        plan.parts.check_base(name, checksums[0], plan.base.path)
    for source, found in zip(plan.section(name).inputs, checksums, strict=False):
        if isinstance(source, TaskPart) and found and not source.is_product(name):
            source.check_sums(name, [found])


def merge_tile(
    plan: MergePlan,
    tile: Tile,
    inputs: Sequence[Values],
    device: torch.device,
    measure_norms: bool | None = None,
) -> MergeResult:
    """Merge the inputs that `read_tile` returned. For `measure_norms` see `merge_tensors`.

    Returns:
        The merged rows, on the CPU, and their report.

    Raises:
        NonFiniteError, ConvergenceError: the values cannot be merged; the message names the tensor.
        torch.cuda.OutOfMemoryError: the GPU is out of memory.
    """
    plan, tensor = plan.section(tile.name), plan.tensors[tile.name]
    if tensor.treatment.kind == "base":
        report = TensorReport(plan.config.merge_method, "base", tensor.treatment.reason, tensor.spec.shape)
        if tensor.stored_parts is not None:
            return MergeResult(_whole(inputs[0]), report, parts={})
        if tensor.fp8 is not None:
            weight, scales = plan.base.load_fp8(tile.name, (tile.first, tile.last))
            return MergeResult(weight, report, scales)
        return MergeResult(stored(_whole(inputs[0]), tensor.spec.dtype, tile.name), report)
    on_device = _on_device(plan, tensor, inputs, device)
    if tensor.treatment.present_only:
        return _as_written(plan, tile, _mean(plan, tensor, on_device))
    base = _whole(on_device[plan.base])
    if plan.parts is not None:
        return _as_written(plan, tile, _from_parts(plan, tensor, base, on_device))
    models = [_model(plan, model, on_device) for model in plan.tuned]
    if tensor.stored_parts is not None:
        return _decomposed(plan, tile, base, models)
    result = merge_tensors(
        base,
        models,
        plan.config,
        name=tile.name,
        position=tensor.position,
        seeded_by=tensor.seeded_by,
        out_dtype=tensor.merged_dtype,
        measure_norms=measure_norms,
        blocks=replace(tensor.blocks, first=tile.first),
    )
    result.weight = result.weight.cpu()
    if tensor.aligned:
        restore_untouched(plan, tile.name, tile.first, _whole(inputs[0]), result.weight)
    return _merged(plan, tile, result)


def merge_group(
    plan: MergePlan,
    tiles: Sequence[Tile],
    inputs: Sequence[Sequence[Values]],
    device: torch.device,
    measure_norms: bool | None = None,
) -> list[MergeResult]:
    """Merge whole tensors in one batch, see `plan.batches`.

    Args:
        plan: the plan.
        tiles: of the tensors of a group.
        inputs: what `read_tile` returned for each.
        device: that merges.
        measure_norms: see `merge_tensors`.

    Returns:
        The merged tensors, on the CPU, and their reports.

    Raises:
        NonFiniteError, ConvergenceError, torch.cuda.OutOfMemoryError: as `merge_tile`.
    """
    own, members = plan.section(tiles[0].name), []
    for tile, values in zip(tiles, inputs, strict=True):
        tensor = own.tensors[tile.name]
        on_device = _on_device(own, tensor, values, device)
        models = [_model(own, model, on_device) for model in own.tuned]
        base = _whole(on_device[own.base])
        members.append(BatchMember(base, models, tile.name, tensor.position, tensor.merged_dtype))
    results = merge_batch(members, own.config, measure_norms=measure_norms)
    for result in results:
        result.weight = result.weight.cpu()
    return [_merged(own, tile, result) for tile, result in zip(tiles, results, strict=True)]


def _on_device(
    plan: MergePlan, tensor: TensorPlan, inputs: Sequence[Values], device: torch.device
) -> dict[Checkpoint | Adapter, Values]:
    """Return the values of each input, on the device that merges."""
    return {
        plan.inputs[part.source]: values.to(device, non_blocking=True)
        for part, values in zip(tensor.parts, inputs, strict=True)
    }


def _merged(plan: MergePlan, tile: Tile, result: MergeResult) -> MergeResult:
    """Complete the report of a merged tile, and return it as it is written."""
    result.report.shape = plan.tensors[tile.name].spec.shape
    certificate = result.report.certificate
    if certificate is not None and certificate.escalations:
        _LOG.info("%s: solved by %s after %s", tile.name, certificate.route, "; ".join(certificate.escalations))
    return _as_written(plan, tile, result)


def _decomposed(plan: MergePlan, tile: Tile, base: Tensor, models: Sequence[Tensor | Factored]) -> MergeResult:
    """Decompose the inputs into their parts, as they are written."""
    tensor = plan.tensors[tile.name]
    assert tensor.stored_parts is not None
    found = summands_of(
        base,
        models,
        plan.config,
        name=tile.name,
        position=tensor.position,
        blocks=replace(tensor.blocks, first=tile.first),
    )
    written = store_parts(found.parts, tensor.stored_parts, tile.name)
    report = found.report
    report.shape, report.part_error = tensor.spec.shape, found.error
    report.part_products, report.part_rounding = written.products, written.rounding
    return MergeResult(base, report, parts=written.tensors)


def _from_parts(
    plan: MergePlan, tensor: TensorPlan, base: Tensor, loaded: Mapping[Checkpoint | Adapter, Values]
) -> MergeResult:
    """Merge the parts of a tensor."""
    assert plan.parts is not None
    parts = [loaded[model.adapter] for model in plan.tuned if isinstance(model, AdaptedModel)]
    result = merge_parts(
        base,
        [part for part in parts if isinstance(part, Tensor | Factored)],
        plan.parts.tensors[tensor.name].cut(plan.config.parts_rank),
        tensor.options,
        tensor.merged_dtype,
        method=plan.config.method.name,
        name=tensor.name,
        dtype=None if plan.config.dtype is None else getattr(torch, plan.config.dtype),
    )
    result.weight = result.weight.cpu()
    return result


def _as_written(plan: MergePlan, tile: Tile, result: MergeResult) -> MergeResult:
    """Round the result to FP8 if the tensor is written in it, and add to the report what that changed."""
    layout = plan.tensors[tile.name].fp8
    if layout is not None:
        rounded = requantise(result.weight, layout, plan.base.load_scales(tile.name, (tile.first, tile.last)))
        result.weight, result.scales = rounded.weight, rounded.scales
        result.report.rounding_norm, result.report.weight_norm = rounded.rounding_norm, rounded.weight_norm
    return result


def _mean(plan: MergePlan, tensor: TensorPlan, loaded: Mapping[Checkpoint | Adapter, Values]) -> MergeResult:
    """Return the mean of the models that have a tensor."""
    present = []
    for model in plan.tuned:
        origin = model.base if isinstance(model, AdaptedModel) else model
        if origin in loaded:
            update = loaded.get(model.adapter) if isinstance(model, AdaptedModel) else None
            base = _whole(loaded[origin])
            present.append(base if update is None else _tuned(base, update))
    result = mean_of_present(
        present, plan.config, tensor.treatment.reason, name=tensor.name, out_dtype=tensor.merged_dtype
    )
    result.weight, result.report.shape = result.weight.cpu(), tensor.spec.shape
    return result


def _model(
    plan: MergePlan, model: Checkpoint | AdaptedModel, loaded: Mapping[Checkpoint | Adapter, Values]
) -> Tensor | Factored:
    """Return the values that a model has for a tensor, or the update that it adds to the base."""
    origin = model.base if isinstance(model, AdaptedModel) else model
    base = _whole(loaded[origin])
    update = loaded.get(model.adapter) if isinstance(model, AdaptedModel) else None
    if update is not None:
        return update if isinstance(update, Factored) and origin is plan.base else _tuned(base, update)
    if origin is not plan.base or not any(isinstance(values, Factored) for values in loaded.values()):
        return base
    return Factored(base.new_zeros(base.shape[0], 0), base.new_zeros(0, base.shape[1]))


def _tuned(base: Tensor, update: Values) -> Tensor:
    """Return the tuned tensor of a model whose adapter changes the base."""
    if isinstance(update, Factored):
        return base_plus(base, update)
    change = Added(update) if isinstance(update, Tensor) else update  # a dense part is a difference
    return change.applied(base)


def _whole(values: Values) -> Tensor:
    assert isinstance(values, Tensor)
    return values


class Assembly:
    """Checksums and report of a tensor, so far, while its tiles are written in order.

    Args:
        copied_from: the checkpoint whose bytes the tensor is; None if it is computed.
    """

    def __init__(self, copied_from: Checkpoint | None = None) -> None:
        self._source = copied_from
        self._checksums: dict[str, Checksum | None] = {}  # None: that of the input
        self._report: TensorReport | None = None

    def write(self, tensor: TensorPlan, tile: Tile, result: MergeResult, shards: Shards) -> None:
        """Write the next tile to its shards."""
        first = None if tile.count == 1 else tile.first
        with timed(result.report.stages, "write"):
            for name, values, row in _written(tensor, result, first):
                if self._source is not None:
                    rows = None if first is None else (tile.first, tile.last)
                    if not shards.copy(name, self._source, rows):
                        shards.write(name, values, row)
                    self._checksums[name] = None
                    continue
                shards.write(name, values, row)
                checksum = self._checksums.setdefault(name, Checksum())
                assert checksum is not None
                checksum.update(values)
        if self._report is None:
            self._report = result.report
        else:
            self._report.add_rows(result.report)

    def finish(self, tensor: TensorPlan, inputs: Sequence[str], shards: Shards) -> Finished:
        """Return the journal entry, once all tiles are written.

        Args:
            tensor: the plan of the tensor.
            inputs: checksums of the inputs.
            shards: the shards that it was written to.
        """
        assert self._report is not None
        stored = []
        for name, checksum in self._checksums.items():
            layout, sums = shards.layout(name), inputs[0] if checksum is None else checksum.hexdigest()
            spec, offset = layout.specs[name], layout.offsets[name]
            stored.append(Stored(name, layout.file_name, offset, spec.nbytes, dtype_name(spec.dtype), spec.shape, sums))
        return Finished(tensor.name, tuple(stored), tuple(inputs), asdict(self._report))


def _written(tensor: TensorPlan, result: MergeResult, first: int | None) -> Iterator[tuple[str, Tensor, int | None]]:
    """Yield name, values and first row of everything that is written of a tile; `first` is None for a whole tensor."""
    if result.parts is not None:
        yield from ((name, values, first) for name, values in result.parts.items())
        return
    yield tensor.name, result.weight, first
    if tensor.fp8 is not None and result.scales is not None:
        yield tensor.fp8.scale_name, result.scales, None if first is None else first_scale_row(tensor.fp8, first)


def check_tables(plan: MergePlan) -> None:
    """Compare the integers and 8-bit floats that must be the same in all models: see `must_agree`.

    Raises:
        QuantisedRefusedError: a tensor differs; the message names the tensor and the model.
    """
    for name, tensor in plan.tensors.items():
        if tensor.treatment.kind != "base":
            continue
        base, *others = [source for source in plan.section(name).inputs if isinstance(source, Checkpoint)]
        own = base.tensors[name]
        if not must_agree(own, excluded=tensor.treatment.excluded):
            continue
        for checkpoint in others:
            header = checkpoint.tensors.get(name)
            if header is None:  # an excluded one may be missing, and so may any by the policy
                continue
            if header.shape != own.shape or not all(
                same_values(base.load(name, rows=rows), checkpoint.load(name, rows=rows)) for rows in _pieces(own)
            ):
                raise differing_error(name, checkpoint.path, header, own)


def check_copies(plan: MergePlan) -> None:
    """Compare values that are stored twice: tied output heads, weights of the base in adapters, tables.

    Raises:
        CheckpointError: two copies differ.
        QuantisedRefusedError: as `check_tables`.
    """
    check_tables(plan)
    for copy in plan.copies:
        stored, other = (copy.checkpoint.tensors[name] for name in (copy.name, copy.original))
        if (stored.shape, stored.dtype) != (other.shape, other.dtype) or not all(
            torch.equal(copy.checkpoint.load(copy.name, rows=rows), copy.checkpoint.load(copy.original, rows=rows))
            for rows in _pieces(stored)
        ):
            raise CheckpointError(
                f"{copy.checkpoint.path}: {copy.name} should be the same as {copy.original}, but the two differ: "
                f"{copy.why}"
            )
    for model in plan.tuned:
        if not isinstance(model, AdaptedModel):
            continue
        for name, module in model.modules.items():
            if module in model.adapter.base_layers and not _holds_the_base(model, name, module):
                raise CheckpointError(
                    f"{model.path}: its copy of the base weight {name} differs from {model.base.path}; was the weight "
                    "trained too, or the vocabulary resized?"
                )


def _holds_the_base(model: AdaptedModel, name: str, module: str) -> bool:
    """Whether the base weight that PEFT stored in an adapter equals the checkpoint's, rounded to either dtype."""
    header = model.adapter.base_layer_header(module)
    if header.shape != model.base.tensors[name].shape:
        return False
    for rows in _pieces(header):
        copy, own = model.adapter.load_base_layer(module, rows=rows), model.base.load(name, rows=rows)
        if not (torch.equal(copy, own.to(copy.dtype)) or torch.equal(copy.to(own.dtype), own)):
            return False
    return True


def _pieces(header: TensorHeader) -> Iterator[tuple[int, int]]:
    """Yield the first and last (exclusive) row of each piece of a matrix."""
    step = max(1, _PIECE_BYTES * header.shape[0] // max(1, header.nbytes)) if header.shape else 1
    for first in range(0, header.shape[0] if header.shape else 0, step):
        yield first, min(first + step, header.shape[0])
