"""Exact selection of the largest magnitudes of a whole model, one tensor in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import ConfigError, ShapeError
from .._checks import accumulation_dtype, check_group, raise_not_finite, whole
from ..magnitude_histogram import magnitude_histogram
from . import MagnitudeSelection

Stream = Callable[[], Iterable[Tensor | tuple[Tensor, Tensor]]]


class _Format(NamedTuple):
    integer: torch.dtype
    digits: tuple[int, ...]  # bits of each, the highest first; 31 or 63 in all
    nonfinite: int  # so many of the values of the first digit belong to infinity and NaN


FORMATS = {
    torch.float32: _Format(torch.int32, (11, 10, 10), 1 << 3),
    torch.float64: _Format(torch.int64, (11, 11, 11, 10, 10, 10), 1),
}


def magnitude_select_many(tensors: Stream, keep: int, *, backend: str | None = None) -> list[MagnitudeSelection]:
    """Find the `keep` largest magnitudes of all tensors together; of equal ones the lowest (tensor, index) goes first.

    Exact: the masks made from the results have `keep` elements set in all. Magnitudes are compared in float32; in
    float64, to which all are widened, if any tensor is float64. One tensor is in memory at a time, and 2**10 counts
    for each.

    Args:
        tensors: returns an iterable over the tensors, or over pairs (x, base) for the magnitudes of ``x - base``, the
            same ones each time it is called: once per pass. float32 takes 3 passes, float64 6 and one that ends at the
            first float64 tensor. See `magnitude_select` for what the tensors may be, and how differences are formed.
        keep: how many elements survive, from 0 to the number of all elements.
        backend: of `magnitude_histogram`: run this implementation or raise; None takes the fastest available one.

    Returns:
        One selection per tensor, on its device: all with the same threshold, in the dtype magnitudes are compared in.

    Raises:
        ConfigError: `keep` is out of range.
        NonFiniteError: a value is NaN or infinite.
        ShapeError: the passes differ: in the number of tensors, in their shapes, dtypes or values.
        DTypeError, DeviceError, BackendUnavailableError: as for `magnitude_select`.
    """
    dtype, keep = torch.float32, whole(keep, "magnitude_select_many: keep")
    form, first = FORMATS[dtype], _pass(tensors, dtype, 0, 0, 0, backend)
    if first is None:
        dtype = torch.float64
        form, first = FORMATS[dtype], _pass(tensors, dtype, 0, 0, 0, backend)
    if first is None:
        raise _differing_passes()
    for index, (tensor, bad) in enumerate(zip(first.tensors, first.counts, strict=True)):
        if bad.any():
            raise_not_finite(f"magnitude_select_many, tensor {index}", int(bad.sum()), tensor.shape.numel())
    numel = sum(tensor.shape.numel() for tensor in first.tensors)
    if not 0 <= keep <= numel:
        raise ConfigError(f"magnitude_select_many: keep must lie in [0, {numel}], got {keep}")
    if keep == 0:
        return [_selection(math.inf, 0, dtype, tensor.device) for tensor in first.tensors]

    latest = first
    prefix = prefix_bits = 0
    left, undecided = keep, numel  # of the magnitudes that begin with the prefix, so many survive; so many there are
    for place, bits in enumerate(form.digits):
        if place > 0:
            again = _pass(tensors, dtype, place, prefix, prefix_bits, backend)
            if again is None or again.tensors != first.tensors or int(again.total.sum()) != undecided:
                raise _differing_passes()
            latest = again
        falling = latest.total.flip(0)
        reached = falling.cumsum(0)
        above = int((reached < left).sum())  # the digits above that of the smallest survivor
        undecided = int(falling[above])
        left -= int(reached[above]) - undecided
        digit = (1 << bits) - 1 - above
        prefix, prefix_bits = (prefix << bits) + digit, prefix_bits + bits

    threshold = float(torch.tensor(prefix, dtype=form.integer).view(dtype))
    selections = []
    for tensor, counts in zip(latest.tensors, latest.counts, strict=True):
        ties = min(left, int(counts[digit]))
        left -= ties
        selections.append(_selection(threshold, ties, dtype, tensor.device))
    return selections


class _Description(NamedTuple):
    """What must be the same in each pass."""

    shape: torch.Size
    dtypes: tuple[torch.dtype, ...]
    device: torch.device


class _Pass(NamedTuple):
    total: Tensor  # counts of the digit, on the CPU
    tensors: list[_Description]
    counts: list[Tensor]  # of each tensor: of the first digit, what is not finite; of the last, all; else nothing


def _pass(
    tensors: Stream, dtype: torch.dtype, place: int, prefix: int, prefix_bits: int, backend: str | None
) -> _Pass | None:
    """Count digit number `place`; None if there are magnitudes that are wider than `dtype`."""
    form = FORMATS[dtype]
    bits = form.digits[place]
    part = slice(-form.nonfinite, None) if place == 0 else slice(0, (1 << bits) if place == len(form.digits) - 1 else 0)
    totals: dict[torch.device, Tensor] = {}  # where the tensors are: a GPU is waited for at the end only
    result = _Pass(torch.zeros(1 << bits, dtype=torch.int64), [], [])
    for item in tensors():
        x, base = item if isinstance(item, tuple) else (item, None)
        check_group(x if base is None else base, [x], op="magnitude_select_many")
        group = [x] if base is None else [x, base]
        own = accumulation_dtype(*group)
        if torch.promote_types(own, dtype) != dtype:
            return None
        result.tensors.append(_Description(x.shape, tuple(tensor.dtype for tensor in group), x.device))
        if own != dtype:  # rounded to float32 as ever, then widened
            x, base = (x if base is None else x.to(own) - base.to(own)).to(dtype), None
        counts = magnitude_histogram(x, bits, prefix=prefix, prefix_bits=prefix_bits, base=base, backend=backend)
        result.counts.append(counts[part].clone())
        totals[x.device] = totals[x.device] + counts if x.device in totals else counts
    for total in totals.values():
        result.total.add_(total.cpu())
    return result


def _selection(threshold: float, ties: int, dtype: torch.dtype, device: torch.device) -> MagnitudeSelection:
    return MagnitudeSelection(torch.tensor(threshold, dtype=dtype, device=device), torch.tensor(ties, device=device))


def _differing_passes() -> ShapeError:
    return ShapeError(
        "magnitude_select_many: the passes over the tensors differ in number, shapes, dtypes or values of the tensors; "
        "the callable must yield the same ones each time"
    )
