"""Tied tensors: one tensor that a state dict holds under several names, as an embedding and the head that shares it."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import torch
from torch import Tensor

from .ops._checks import FLOAT_DTYPES

# Elements by which tensors are told apart before they are compared whole.
_SAMPLE = 16


def same_memory(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors are one: changing an element of one changes that of the other."""
    return (
        first.data_ptr() == second.data_ptr()
        and (first.shape, first.stride(), first.dtype, first.device)
        == (second.shape, second.stride(), second.dtype, second.device)
        and first.numel() > 0
    )


def is_copy(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors are one, or have the same dtype, device, shape and values (NaN has no equal)."""
    alike = (first.shape, first.dtype, first.device) == (second.shape, second.dtype, second.device)
    return alike and (same_memory(first, second) or torch.equal(first, second))


def tied_names(base: Mapping[str, Tensor], tuned: Sequence[Mapping[str, Tensor]]) -> dict[str, str]:
    """Find the tensors that are copies of another one, in the base and in every fine-tune alike.

    Args:
        base: name to tensor.
        tuned: T state dicts with the same names.

    Returns:
        The name of each copy, with that of its tensor: of all its names the last in the alphabet, whatever the order of
        the state dicts. Only floating-point tensors with elements are looked at.

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
        found = (other for other in alike if all(is_copy(x[other], x[name]) for x in (base, *tuned)))
        original = next(found, None)
        if original is None:
            alike.append(name)
        else:
            copies[name] = original
    return copies


def _sample(tensor: Tensor) -> Hashable:
    """Return what copies have in common: all about their form, and some values."""
    row = tensor.detach()
    while row.ndim > 1:
        row = row[-1]
    return tensor.shape, tensor.dtype, tensor.device, tuple(row.reshape(-1)[-_SAMPLE:].tolist())
