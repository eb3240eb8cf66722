"""Write values in FP8, in the layout that a weight was read from: dtype, and shape and dtype of its scales.

A block gets the scale that makes its largest magnitude the largest number of the format. Where the scale that it had
before fits (the values do not exceed it, and use the format to a quarter), it is kept: values that a merge did not
change then have their old bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .scaled import PIECE, ScaledHeader, matrix_scales, spread_scales

# Scales up to this factor above the smallest that fits are kept.
_SLACK = 4.0


@dataclass(frozen=True)
class Requantised:
    """Rows of a weight in FP8.

    Attributes:
        weight: in the stored dtype.
        scales: those of these rows, in their stored dtype.
        rounding_norm: Frobenius norm of what rounding changed.
        weight_norm: Frobenius norm of the values before.
    """

    weight: Tensor
    scales: Tensor
    rounding_norm: float
    weight_norm: float


def rows_of_scale(header: ScaledHeader) -> int:
    """Return the number of rows of the leading dimension that have to be written together."""
    if len(header.shape) == 3:
        several = math.prod(header.scales.shape) > math.prod(matrix_scales(header))
        return 1 if several else header.shape[0]
    return header.block[0]


def first_scale_row(header: ScaledHeader, row: int) -> int | None:
    """Return the index of the first scale of rows that begin at `row`; None if there is a single one for all rows."""
    unit = rows_of_scale(header)
    return None if unit >= header.shape[0] else row // unit


def requantise(values: Tensor, header: ScaledHeader, before: Tensor) -> Requantised:
    """Round rows of a weight to FP8.

    Args:
        values: (rows, n), or (experts, m, n), float32 on the CPU, finite; whole units of `rows_of_scale`, or the rest.
        header: the layout.
        before: the scales that these rows had, as stored.
    """
    height, width = values.shape[-2:]
    tall = min(header.block[0], height)
    dtype, scale_dtype = header.weight.dtype, header.scales.dtype
    largest, least = torch.finfo(dtype).max, torch.finfo(scale_dtype).tiny
    per_matrix, per_row = -(-height // tall), matrix_scales(header)[1]
    matrices = values.view(-1, height, width)
    own = before.float().reshape(-1, per_matrix, per_row)
    weight, scales = torch.empty(values.shape, dtype=dtype, device="cpu"), torch.empty_like(own)
    magnitudes = torch.stack([_magnitudes(matrix, tall, header.block[1], per_row) for matrix in matrices])
    if len(own) < len(matrices):  # one matrix of scales for all experts
        magnitudes = magnitudes.amax(0, keepdim=True)
    smallest = magnitudes / largest
    fits = (own >= smallest) & ((own <= _SLACK * smallest) | (smallest == 0)) & (own > 0) & own.isfinite()
    scales = torch.where(fits, own, smallest).clamp(min=least).to(scale_dtype)
    squares = torch.zeros(2, dtype=torch.float64, device="cpu")
    for index, matrix in enumerate(matrices):
        chosen = scales[index if len(scales) > 1 else 0].float()
        out = weight.view(-1, height, width)[index]
        step = max(1, PIECE // max(1, width))
        for start in range(0, height, step):
            piece = matrix[start : start + step]
            rows = torch.arange(start, start + len(piece), device=piece.device) // tall
            factors = spread_scales(chosen[rows], header.block[1], width)
            rounded = (piece / factors).clamp_(-largest, largest).to(dtype)
            out[start : start + step] = rounded
            change = rounded.float().mul_(factors).sub_(piece)
            squares += torch.stack([change.double().square().sum(), piece.double().square().sum()])
    rounding, norm = squares.sqrt().tolist()
    return Requantised(weight, scales.reshape(before.shape), rounding, norm)


def _magnitudes(matrix: Tensor, tall: int, each: int, per_row: int) -> Tensor:
    """Return the largest magnitude of each block of a matrix."""
    found = []
    for start in range(0, matrix.shape[0], tall):
        rows = matrix[start : start + tall]
        # Of a column over all rows first: no copy of the rows is made.
        column = torch.maximum(rows.amax(0), -rows.amin(0))
        padded = column.new_zeros(per_row * each)
        padded[: len(column)] = column
        found.append(padded.view(per_row, each).amax(1))
    return torch.stack(found)
