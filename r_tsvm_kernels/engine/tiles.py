"""The unit of work that every engine shares: some rows of one tensor are read and merged.

Most tensors are one tile; those whose rows may be merged apart are cut into several (`schedule`). A tile is merged with
one thread of torch, because BLAS and LAPACK round differently with more: the result is then the same to the bit
whatever runs beside it, in which order, on how many workers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from ..checkpoint import Checkpoint, Checksum, TensorHeader
from ..errors import CheckpointError, MemoryBudgetError
from ..linalg import Factored
from ..lora import Adapter
from ..lora.adapted_model import AdaptedModel
from ..merge import base_plus, merge_tensors, stored
from ..methods import MergeResult, TensorReport, timed
from ..plan import MergePlan
from ..quantised import differing_error, must_agree, same_values
from ..text import dtype_name
from .journal import Finished
from .scheduling import TensorSchedule
from .shards import Shards

# Rows of tied heads and embeddings are compared in pieces of about this size.
_PIECE_BYTES = 64 << 20


@dataclass(frozen=True)
class Tile:
    """Rows `first` to `last` (exclusive) of a tensor; all of them in the only tile of a tensor that is not cut."""

    name: str
    index: int
    count: int
    first: int
    last: int

    @property
    def is_last(self) -> bool:
        """Whether no tile of the tensor comes after this one."""
        return self.index + 1 == self.count


def tiles_of(name: str, schedule: TensorSchedule) -> Iterator[Tile]:
    """Yield the tiles of a tensor, in order."""
    for index, (first, last) in enumerate(schedule.tiles):
        yield Tile(name, index, schedule.count, first, last)


def read_tile(plan: MergePlan, tile: Tile, *, pin: bool = False) -> list[Tensor | Factored]:
    """Read a tile of every input that has a part of the tensor, the base's first; of an adapter the factors.

    Raises:
        InputChangedError, CheckpointError: an input cannot be read, or is not what it was.
    """
    rows = None if tile.count == 1 else (tile.first, tile.last)
    sources = [plan.inputs[part.source] for part in plan.tensors[tile.name].parts]
    return [
        source.task_matrix(plan.module(source, tile.name), pin=pin)  # never cut: see `MergePlan.row_wise`
        if isinstance(source, Adapter)
        else source.load(tile.name, rows=rows, pin=pin)
        for source in sources
    ]


def update_checksum(checksum: Checksum, values: Tensor | Factored) -> None:
    """Add what was read to a checksum: of an update both factors."""
    for tensor in (values.left, values.right) if isinstance(values, Factored) else (values,):
        checksum.update(tensor.contiguous())


def checksums_by_input(plan: MergePlan, name: str, checksums: Sequence[Checksum]) -> list[str]:
    """Return the checksums of what was read of each input, up to the last one that has a part of the tensor."""
    found = {part.source: sums.hexdigest() for part, sums in zip(plan.tensors[name].parts, checksums, strict=True)}
    return [found.get(source, "") for source in range(max(found) + 1)]


def merge_tile(
    plan: MergePlan,
    tile: Tile,
    inputs: Sequence[Tensor | Factored],
    device: torch.device,
    measure_norms: bool | None = None,
) -> MergeResult:
    """Merge what `read_tile` read; the weight of the result lies on the CPU. For `measure_norms` see `merge_tensors`.

    Raises:
        NonFiniteError, ConvergenceError: the values cannot be merged; the message names the tensor.
        MemoryBudgetError: the GPU has no memory left.
    """
    tensor = plan.tensors[tile.name]
    if tensor.treatment.kind == "base":
        report = TensorReport(plan.config.merge_method, "base", tensor.treatment.reason, tensor.spec.shape)
        return MergeResult(stored(_whole(inputs[0]), tensor.spec.dtype, tile.name), report)
    try:
        on_device = {
            plan.inputs[part.source]: values.to(device, non_blocking=True)
            for part, values in zip(tensor.parts, inputs, strict=True)
        }
        base = _whole(on_device[plan.base])
        models = [_model(plan, model, on_device) for model in plan.tuned]
        result = merge_tensors(
            base,
            models,
            plan.config,
            name=tile.name,
            position=tensor.position,
            seeded_by=tensor.seeded_by,
            out_dtype=tensor.spec.dtype,
            measure_norms=measure_norms,
        )
        result.weight = result.weight.cpu()
    except torch.cuda.OutOfMemoryError as error:
        raise MemoryBudgetError(
            f"{tile.name}: {device} has no memory left for it ({error}); set --threads 1 or a smaller --device-memory, "
            "end other programs on the GPU, or use --device cpu"
        ) from error
    result.report.shape = tensor.spec.shape
    return result


def _model(
    plan: MergePlan, model: Checkpoint | AdaptedModel, loaded: Mapping[Checkpoint | Adapter, Tensor | Factored]
) -> Tensor | Factored:
    """Return what a model has for a tensor: its values, or what they differ from the base by."""
    origin = model.base if isinstance(model, AdaptedModel) else model
    base = _whole(loaded[origin])
    update = loaded.get(model.adapter) if isinstance(model, AdaptedModel) else None
    if isinstance(update, Factored):
        return update if origin is plan.base else base_plus(base, update)
    if origin is not plan.base or not any(isinstance(values, Factored) for values in loaded.values()):
        return base
    return Factored(base.new_zeros(base.shape[0], 0), base.new_zeros(0, base.shape[1]))


def _whole(values: Tensor | Factored) -> Tensor:
    assert isinstance(values, Tensor)
    return values


class Assembly:
    """What is known of a tensor whose tiles are written, in order: the checksum and the report so far."""

    def __init__(self) -> None:
        self._checksum = Checksum()
        self._report: TensorReport | None = None

    def write(self, tile: Tile, result: MergeResult, shards: Shards) -> None:
        """Write the next tile to its place."""
        with timed(result.report.stages, "write"):
            shards.write(tile.name, result.weight, None if tile.count == 1 else tile.first)
            self._checksum.update(result.weight)
        if self._report is None:
            self._report = result.report
        else:
            self._report.add_rows(result.report)

    def finish(self, name: str, inputs: Sequence[str], shards: Shards) -> Finished:
        """Return the journal's entry, when all tiles are written.

        Args:
            name: of the tensor.
            inputs: checksums of the inputs.
            shards: where it was written.
        """
        assert self._report is not None
        layout = shards.layout(name)
        spec = layout.specs[name]
        return Finished(
            name,
            shard=layout.file_name,
            offset=layout.offsets[name],
            nbytes=spec.nbytes,
            dtype=dtype_name(spec.dtype),
            checksum=self._checksum.hexdigest(),
            inputs=tuple(inputs),
            report=asdict(self._report),
        )


def check_tables(plan: MergePlan) -> None:
    """Compare the integers and 8-bit floats that are kept only if all models have the same: see `must_agree`.

    Raises:
        QuantisedRefusedError: they differ; the message names the tensor and the model.
    """
    others = [source for source in plan.inputs[1:] if isinstance(source, Checkpoint)]
    for name, tensor in plan.tensors.items():
        own = plan.base.tensors[name]
        if tensor.treatment.kind != "base" or not must_agree(own, excluded=tensor.treatment.excluded):
            continue
        for checkpoint in others:
            header = checkpoint.tensors[name]
            if header.shape != own.shape or not all(
                same_values(plan.base.load(name, rows=rows), checkpoint.load(name, rows=rows)) for rows in _pieces(own)
            ):
                raise differing_error(name, checkpoint.path, header, own)


def check_copies(plan: MergePlan) -> None:
    """Compare what is stored twice: tied output heads, which are not written, weights of the base in adapters, tables.

    Raises:
        CheckpointError: they differ.
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
                    f"{model.path}: the weight of the base that it holds for {name} is not that of {model.base.path}; "
                    "was it trained too, or a vocabulary resized?"
                )


def _holds_the_base(model: AdaptedModel, name: str, module: str) -> bool:
    """Whether the weight that PEFT stored in an adapter is the checkpoint's, rounded to the dtype of either."""
    header = model.adapter.base_layer_header(module)
    if header.shape != model.base.tensors[name].shape:
        return False
    for rows in _pieces(header):
        copy, own = model.adapter.load_base_layer(module, rows=rows), model.base.load(name, rows=rows)
        if not (torch.equal(copy, own.to(copy.dtype)) or torch.equal(copy.to(own.dtype), own)):
            return False
    return True


def _pieces(header: TensorHeader) -> Iterator[tuple[int, int]]:
    """Yield first and last (exclusive) row of pieces of a matrix."""
    step = max(1, _PIECE_BYTES * header.shape[0] // max(1, header.nbytes)) if header.shape else 1
    for first in range(0, header.shape[0] if header.shape else 0, step):
        yield first, min(first + step, header.shape[0])
