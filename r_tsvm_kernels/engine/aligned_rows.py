"""Rows of embeddings and heads whose vocabularies were aligned: read them in the order of the output.

Every model gets all rows of the output. A row that a model lacks is the base's, so that its task vector is zero there.
A row that the base lacks is, in the base and in all models, that of the only model that knows the token, or the mean
of those that do; without a base, so is a row that any model lacks, in the models that lack it. After the merge, rows
without any task vector, or of a single model, are written with the bits that were read.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..checkpoint import Checkpoint, runs
from ..linalg import Factored
from ..lora import Change
from ..lora.adapted_model import AdaptedModel
from ..ops._checks import check_finite
from ..plan import AlignedVocabulary, MergePlan
from ..values import stored

# Rows that are averaged at a time.
_ROWS = 256


def read_aligned(
    plan: MergePlan, name: str, first: int, last: int, *, pin: bool = False
) -> list[Tensor | Factored | Change]:
    """Read rows `first` to `last` (exclusive) of the output from every input that has a part of the tensor, base first.

    Raises:
        InputChangedError, CheckpointError: an input cannot be read, or has changed.
        NonFiniteError: a row that the base lacks holds NaN or infinity.
    """
    vocabulary, tensor = plan.vocabulary, plan.tensors[name]
    assert vocabulary is not None
    shape = (last - first, *tensor.spec.shape[1:])
    base = torch.zeros(shape, dtype=tensor.parts[0].dtype, pin_memory=pin, device="cpu")
    own_rows = vocabulary.rows[plan.base][first:last]
    plan.base.load_rows(name, own_rows, base)
    _read_new_rows(plan, vocabulary, name, first, base)
    found: list[Tensor | Factored | Change] = [base]
    for part in tensor.parts[1:]:
        source = plan.inputs[part.source]
        if isinstance(source, Checkpoint):
            own = torch.empty(shape, dtype=part.dtype, pin_memory=pin, device="cpu").copy_(base)
            source.load_rows(name, vocabulary.rows[source][first:last], own)
            found.append(own)
        else:
            found.append(source.load_change(plan.module(source, name), pin=pin))
    # Without a base, the first model has means only in the rows that it lacks, as the others.
    again = own_rows.masked_fill(~vocabulary.averaged[first:last], -1)
    if bool((again >= 0).any()):
        plan.base.load_rows(name, again, base)
    return found


def restore_untouched(plan: MergePlan, name: str, first: int, base: Tensor, merged: Tensor) -> None:
    """Write the rows without any task vector over those of the merge, with the bits that were read."""
    assert plan.vocabulary is not None
    untouched = plan.vocabulary.untouched[first : first + len(merged)]
    dtype = None if plan.config.dtype is None else getattr(torch, plan.config.dtype)
    for begin, end in _stretches(untouched):
        rows = base[begin:end] if dtype is None else stored(base[begin:end], dtype, name)
        merged[begin:end] = stored(rows, merged.dtype, name)


def _stretches(mask: Tensor) -> Iterator[tuple[int, int]]:
    """Yield begin and end of rows in a mask that follow each other, a bounded number at a time."""
    places = torch.arange(len(mask), device=mask.device).masked_fill(~mask, -1)
    return ((begin, end) for _, begin, end in runs(places, _ROWS))


def _read_new_rows(plan: MergePlan, vocabulary: AlignedVocabulary, name: str, first: int, base: Tensor) -> None:
    """Write the rows of the only model that has them, or the mean of several, where the vocabulary says so."""
    last = first + len(base)
    new = vocabulary.averaged[first:last]
    if not bool(new.any()):
        return
    models = dict.fromkeys(model.base if isinstance(model, AdaptedModel) else model for model in plan.tuned)
    rows = {model: vocabulary.rows[model][first:last] for model in models}
    count = torch.stack([own >= 0 for own in rows.values()]).sum(0)
    for model, own in rows.items():
        alone = own.masked_fill(~new | (count > 1), -1)
        model.load_rows(name, alone, base)
        for begin, end in _stretches(alone >= 0):  # now, or the merge would call them values of the base
            check_finite(base[begin:end], f"{name} of {model.path}")
    shared = torch.nonzero(new & (count > 1)).flatten()
    for start in range(0, len(shared), _ROWS):
        places = shared[start : start + _ROWS]
        total = torch.zeros(
            (len(places), *base.shape[1:]), dtype=torch.promote_types(base.dtype, torch.float32), device=base.device
        )
        for model, own in rows.items():
            values = torch.zeros_like(total)
            model.load_rows(name, own[places], values)
            check_finite(values, f"{name} of {model.path}")
            total += values
        base[places] = (total / count[places].reshape(-1, *[1] * (total.ndim - 1))).to(base.dtype)
