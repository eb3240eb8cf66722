"""Tied tensors: one tensor under several names of a state dict, such as an embedding and the output head."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import torch
from torch import Tensor

from .ops._checks import FLOAT_DTYPES

# Elements that are compared before whole tensors are.
_SAMPLE = 16


def same_memory(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors share all their memory, element by element."""
    return (
        first.data_ptr() == second.data_ptr()
        and (first.shape, first.stride(), first.dtype, first.device)
        == (second.shape, second.stride(), second.dtype, second.device)
        and first.numel() > 0
    )


def is_copy(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors share memory, or have equal dtype, device, shape and values (NaN equals nothing)."""
    alike = (first.shape, first.dtype, first.device) == (second.shape, second.dtype, second.device)
    return alike and (same_memory(first, second) or torch.equal(first, second))


def tied_names(base: Mapping[str, Tensor], tuned: Sequence[Mapping[str, Tensor]]) -> dict[str, str]:
    """Find the tensors that are copies of another one in the base and in every fine-tune.

    Args:
        base: name to tensor.
        tuned: T state dicts with the same names.

    Returns:
        The name of each copy, mapped to that of its original: the alphabetically last of its names, for any order of
        the state dicts. Only floating-point tensors with elements are considered.

    Examples:
        ``tied_names({"head": E, "model.embed": E}, [{"head": F, "model.embed": F.clone()}])`` is
        ``{"head": "model.embed"}``.
    """
    copies: dict[str, str] = {}
    originals: dict[Hashable, list[str]] = {}
    for name in sorted(base, reverse=True):
        tensor = base[name]
        if tensor.dtype not in FLOAT_DTYPES or tensor.numel() == 0:
            continue
        alike = originals.setdefault(_sample(tensor), [])
        found = (other for other in alike if all(_is_copy_in(x, other, name) for x in (base, *tuned)))
        original = next(found, None)
        if original is None:
            alike.append(name)
        else:
            copies[name] = original
    return copies


def _is_copy_in(tensors: Mapping[str, Tensor], other: str, name: str) -> bool:
    return other in tensors and name in tensors and is_copy(tensors[other], tensors[name])


def _sample(tensor: Tensor) -> Hashable:
    """Return a key that copies have in common: shape, dtype, device and some values."""
    row = tensor.detach()
    while row.ndim > 1:
        row = row[-1]
    return tensor.shape, tensor.dtype, tensor.device, tuple(row.reshape(-1)[-_SAMPLE:].tolist())
