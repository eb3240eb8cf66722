"""Weights of 8 or 4 bits with scales, FP8 and MXFP4: find them in a checkpoint, and read the values they stand for.

FP8 is float8 times float32, where a scale belongs to a block, a row or the whole matrix. The product is returned in
float32. MXFP4 is a 4-bit float times a power of two for 32 elements of a row, which bfloat16 holds exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import QuantisedRefusedError
from ..text import dtype_name
from .headers import TensorHeader

# Values of `quant_method` whose weights can be read.
METHODS = {"fp8", "fbgemm_fp8", "compressed-tensors", "modelopt", "mxfp4"}
CONFIG_KEYS = ("quantization_config", "compression_config")

# Reads some rows of a stored tensor, taken as a matrix with so many columns.
ReadRows = Callable[[TensorHeader, int, int, int], Tensor]

# Scales of a weight: endings of names in place of its last part, or behind it.
_INSTEAD, _BEHIND = ("scale_weight", "scale"), ("_scale_inv", "_scale")
# Scales of activations and of a cache, which go with the quantisation.
_OF_ACTIVATIONS = ("input_scale", "input_scale_ub", "output_scale", "k_scale", "v_scale", "q_scale", "scale_input")
_MARKER = "scaled_fp8"  # of files for image models
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_BLOCK = 128
# Elements that are converted at a time.
PIECE = 1 << 20
_GROUP, _GROUP_BYTES = 32, 16
_FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


@dataclass(frozen=True)
class ScaledHeader(TensorHeader):
    """A tensor that is stored as a weight and its scales. Dtype, shape and size are those of the values they stand for.

    Attributes:
        weight: the stored weight.
        scales: the stored scales.
        block: rows and columns of a matrix that share a scale; unused for MXFP4.
        scale_name: name of the scales.
    """

    weight: TensorHeader
    scales: TensorHeader
    block: tuple[int, int]
    scale_name: str

    @property
    def stored(self) -> tuple[TensorHeader, ...]:
        """The stored tensors."""
        return self.weight, self.scales

    @property
    def is_fp8(self) -> bool:
        """Whether it is FP8, and not MXFP4."""
        return self.weight.dtype in _FP8

    @property
    def written_as(self) -> torch.dtype:
        """The dtype of an output, if the recipe sets none."""
        return torch.bfloat16


@dataclass
class Scaled:
    """The scaled weights of a model.

    Attributes:
        headers: by name; that of MXFP4 lacks the ending ``_blocks``.
        places: for each, the name of the stored weight, in whose place it is.
        hidden: names of stored tensors that are not tensors of the model: scales, and scales of activations.
    """

    headers: dict[str, ScaledHeader] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    hidden: set[str] = field(default_factory=set)

    def visible(self, tensors: Mapping[str, TensorHeader]) -> dict[str, TensorHeader]:
        """Return the tensors of the model, in the order of the stored ones."""
        names = {place: name for name, place in self.places.items()}
        kept = ((names.get(name, name), header) for name, header in tensors.items() if name not in self.hidden)
        return {name: self.headers.get(name, header) for name, header in kept}


def find_scaled(tensors: Mapping[str, TensorHeader], config: Mapping[str, Any]) -> Scaled:
    """Find the scaled weights among stored tensors.

    Args:
        tensors: headers of a model's tensors.
        config: its configuration, for the size of blocks.

    Raises:
        QuantisedRefusedError: an FP8 weight has scales of another shape, or none where others have some.
    """
    found, blocks = Scaled(), _block_size(config)
    fp8 = [name for name, header in tensors.items() if header.dtype in _FP8 and len(header.shape) in (2, 3)]
    for name in fp8:
        _add_fp8(found, tensors, name, blocks)
    for name, header in tensors.items():
        if name.endswith("_blocks") and header.dtype == torch.uint8:
            _add_mxfp4(found, tensors, name)
    if found.headers:
        if alone := [name for name in fp8 if name not in found.headers]:
            raise QuantisedRefusedError(
                f"{tensors[alone[0]].file}: {alone[0]} is {dtype_name(tensors[alone[0]].dtype)} without scales, "
                f"which others have ({next(iter(found.headers.values())).scale_name}); is the checkpoint whole?"
            )
        found.hidden |= {name for name, header in tensors.items() if _is_of_activations(name, header)}
    return found


def without_quantisation(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration without the keys that name a quantisation whose weights can be read."""
    kept = {
        key: value
        for key, value in config.items()
        if not (key in CONFIG_KEYS and isinstance(value, Mapping) and value.get("quant_method", "") in METHODS | {""})
    }
    return {key: without_quantisation(value) if isinstance(value, dict) else value for key, value in kept.items()}


def load_scaled(header: ScaledHeader, rows: tuple[int, int], read: ReadRows, pin: bool = False) -> Tensor:
    """Return rows of the leading dimension, as values.

    Args:
        header: of the weight.
        rows: the first, and the last (exclusive).
        read: reads stored rows.
        pin: return page-locked memory.
    """
    values = torch.empty(rows[1] - rows[0], *header.shape[1:], dtype=header.dtype, device="cpu", pin_memory=pin)
    (_read_mxfp4 if header.weight.dtype == torch.uint8 else _read_fp8)(header, rows, read, values)
    return values


# --- FP8


def _add_fp8(found: Scaled, tensors: Mapping[str, TensorHeader], name: str, blocks: tuple[int, int]) -> None:
    weight = tensors[name]
    module, dot, _ = name.rpartition(".")
    names = [*(name + end for end in _BEHIND), *(module + dot + end for end in _INSTEAD)]
    scale_name = next((x for x in names if x in tensors and tensors[x].dtype in _FLOATS), None)
    if scale_name is None:
        return
    scales = tensors[scale_name]
    block = _block_of(weight.shape, scales.shape, blocks)
    if block is None:
        raise QuantisedRefusedError(
            f"{weight.file}: {name} is {dtype_name(weight.dtype)} of {weight.shape}, and {scale_name} of "
            f"{scales.shape} has no scale for each block of {blocks[0]} x {blocks[1]}, row or matrix; dequantise the "
            "model first"
        )
    found.headers[name] = _header(weight, scales, torch.float32, weight.shape, block, scale_name)
    found.places[name] = name
    found.hidden.add(scale_name)


def _header(
    weight: TensorHeader,
    scales: TensorHeader,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    block: tuple[int, int],
    scale_name: str,
) -> ScaledHeader:
    nbytes = dtype.itemsize * math.prod(shape)
    return ScaledHeader(weight.file, dtype, shape, weight.offset, nbytes, weight, scales, block, scale_name)


def _block_size(config: Mapping[str, Any]) -> tuple[int, int]:
    """Return rows and columns of a block of a matrix, as a configuration has them."""
    for key in CONFIG_KEYS:
        given = config.get(key)
        size = given.get("weight_block_size") if isinstance(given, Mapping) else None
        if isinstance(size, list) and len(size) == 2 and all(type(x) is int and x > 0 for x in size):
            return size[0], size[1]
    nested = [value for value in config.values() if isinstance(value, Mapping)]
    return next((size for value in nested if (size := _block_size(value)) != (_BLOCK, _BLOCK)), (_BLOCK, _BLOCK))


def _block_of(shape: tuple[int, ...], scales: tuple[int, ...], blocks: tuple[int, int]) -> tuple[int, int] | None:
    """Return rows and columns of a matrix that share a scale; None if the shapes do not match."""
    matrix = (shape[-2], shape[-1])
    if math.prod(scales) == 1:
        return matrix
    if scales == shape[:-1]:  # a scale for each row
        scales = (*scales, 1)
    if len(shape) == 3 and scales == shape[:1]:  # for each expert
        scales = (*scales, 1, 1)
    if len(scales) != len(shape) or scales[:-2] not in (shape[:-2], (1,) * (len(shape) - 2)):
        return None
    found = []
    for size, count, block in zip(matrix, scales[-2:], blocks, strict=True):
        if count == 1:
            found.append(size)
        elif count == size:
            found.append(1)
        elif count == -(-size // block):
            found.append(block)
        else:
            return None
    return found[0], found[1]


def matrix_scales(header: ScaledHeader) -> tuple[int, int]:
    """Return rows and columns of the scales of one matrix."""
    height, width = header.shape[-2:]
    return -(-height // header.block[0]), -(-width // header.block[1])


def load_scales(header: ScaledHeader, rows: tuple[int, int], read: ReadRows) -> Tensor:
    """Return the stored scales of rows of the leading dimension, which do not cut a block."""
    per_matrix, per_row = matrix_scales(header)
    own = header.scales.shape
    total = math.prod(own)
    if len(header.shape) == 3:
        if total == per_matrix * per_row:
            return read(header.scales, 0, per_matrix, per_row).reshape(own)
        return read(header.scales, rows[0] * per_matrix, rows[1] * per_matrix, per_row).reshape(-1, *own[1:])
    low, high = rows[0] // header.block[0], -(-rows[1] // header.block[0])
    found = read(header.scales, low, high, per_row)
    return found.reshape(-1, *own[1:]) if own else found.reshape(())


def load_packed(header: ScaledHeader, rows: tuple[int, int], read: ReadRows) -> Tensor:
    """Return rows of the leading dimension as stored, in FP8."""
    *outer, height, width = header.shape
    per_row = height if outer else 1
    return read(header.weight, rows[0] * per_row, rows[1] * per_row, width).view(-1, *header.shape[1:])


def spread_scales(scales: Tensor, each: int, width: int) -> Tensor:
    """Return a scale for each column, from one for each `each` columns; a view if one scale holds for all or each."""
    if scales.shape[1] in (1, width):
        return scales
    return scales.repeat_interleave(each, dim=1)[:, :width]


def _read_fp8(header: ScaledHeader, rows: tuple[int, int], read: ReadRows, values: Tensor) -> None:
    *outer, height, width = header.shape
    tall, each = header.block
    per_matrix, per_row = matrix_scales(header)
    flat = values.view(-1, width)
    first = rows[0] * height if outer else rows[0]
    several = math.prod(header.scales.shape) > per_matrix * per_row  # each expert has its own
    for start, stop in _pieces(first, first + len(flat), height, width):
        piece = flat[start - first : stop - first]
        piece.copy_(read(header.weight, start, stop, width))
        matrix, row = divmod(start, height) if outer else (0, start)
        own = per_matrix * matrix if several else 0
        low, high = row // tall, (row + stop - start - 1) // tall + 1
        scales = read(header.scales, own + low, own + high, per_row).float()
        if tall > 1:
            index = torch.arange(row, row + stop - start, device=scales.device) // tall - low
            scales = scales[index]
        _multiply(piece, scales, each)


def _multiply(piece: Tensor, scales: Tensor, each: int) -> None:
    """Multiply `each` columns by each column of scales; the last may have fewer."""
    whole = piece.shape[1] // each
    if whole:
        blocks = piece[:, : whole * each].as_strided((len(piece), whole, each), (piece.stride(0), each, 1))
        blocks.mul_(scales[:, :whole, None])
    if whole * each < piece.shape[1]:
        piece[:, whole * each :].mul_(scales[:, whole:])


def _pieces(first: int, last: int, height: int, width: int) -> Iterator[tuple[int, int]]:
    """Yield rows of pieces that do not cross from one matrix of so many rows to the next."""
    step = max(1, PIECE // max(1, width))
    while first < last:
        stop = min(first + step, last, (first // height + 1) * height)
        yield first, stop
        first = stop


# --- MXFP4


def _add_mxfp4(found: Scaled, tensors: Mapping[str, TensorHeader], blocks_name: str) -> None:
    """Add experts (E, m, groups, 16) as loaders make them of them: matrices (E, 32 groups, m), transposed."""
    name = blocks_name.removesuffix("_blocks")
    weight, scale_name = tensors[blocks_name], f"{name}_scales"
    scales = tensors.get(scale_name)
    if scales is None or scales.dtype != torch.uint8 or scales.shape != weight.shape[:-1] or name in tensors:
        return
    if len(weight.shape) != 4 or weight.shape[-1] != _GROUP_BYTES:
        return
    experts, rows, groups, _ = weight.shape
    shape = (experts, groups * _GROUP, rows)
    found.headers[name] = _header(weight, scales, torch.bfloat16, shape, (1, _GROUP), scale_name)
    found.places[name] = blocks_name
    found.hidden.add(scale_name)


def _read_mxfp4(header: ScaledHeader, rows: tuple[int, int], read: ReadRows, values: Tensor) -> None:
    _, height, groups, _ = header.weight.shape
    positive = torch.tensor(_FP4, dtype=torch.bfloat16, device="cpu")
    table = torch.cat([positive, -positive])
    pairs = torch.stack([table.repeat(16), table.repeat_interleave(16)], dim=1)  # of each byte, the low half first
    first = rows[0] * height
    for start, stop in _pieces(first, rows[1] * height, height, groups * _GROUP):
        packed = read(header.weight, start, stop, groups * _GROUP_BYTES)
        powers = torch.exp2(read(header.scales, start, stop, groups).double() - 127)
        powers[powers == 2.0**128] = torch.nan  # the byte 255
        piece = pairs[packed.flatten().int()].view(stop - start, groups, _GROUP)
        piece = (piece * powers.to(torch.float32).unsqueeze(-1)).to(torch.bfloat16).flatten(1)
        expert, row = divmod(start - first, height)
        values[expert, :, row : row + stop - start] = piece.mT


def _is_of_activations(name: str, header: TensorHeader) -> bool:
    last = name.rpartition(".")[2]
    return last == _MARKER or (last in _OF_ACTIVATIONS and len(header.shape) <= 1)
