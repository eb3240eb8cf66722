"""Tied tensors that only some checkpoints store: copies of another tensor, as an output head of the embedding.

Old files hold such copies and new ones mostly do not. Often only the class of the model says which tensors are tied, so
copies are recognised by their values. The output has the tensors of the base.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from ..ops._checks import FLOAT_DTYPES
from ..parameters import split_layer
from .reader import Checkpoint

# The output head of language models, and the embeddings to which a config can tie it.
_HEAD = "lm_head.weight"
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight")
# Largest tensor that planning compares whole; of larger tensors two rows are compared.
_SMALL = 1 << 20


@dataclass(frozen=True)
class Copy:
    """A tensor of a checkpoint that must equal another tensor of it.

    Attributes:
        checkpoint: the checkpoint that stores both.
        name: name of the copy.
        original: name of the other tensor.
        dropped: whether the copy is left out of the merge.
        why: why it is taken for a copy, and what to do if it is not one; for the error.
    """

    checkpoint: Checkpoint
    name: str
    original: str
    dropped: bool
    why: str


def settle_copies(base: Checkpoint, others: Sequence[Checkpoint]) -> tuple[Copy, ...]:
    """Find the copies by which the tensors of checkpoints differ.

    A copy that the base lacks is left out. If another checkpoint lacks a copy, it then reads the original instead. If
    the config of the base ties the output head, all checkpoints leave it out.

    Args:
        base: the checkpoint whose tensors the output has.
        others: the checkpoints that are merged with it.

    Returns:
        The copies that were found; of large tensors two rows were compared.
    """
    copies = _tied_heads(base, (base, *others))
    heads = {copy.name for copy in copies}
    for checkpoint in others:
        for name in sorted(checkpoint.tensors.keys() - base.tensors.keys() - heads):
            if original := find_original(checkpoint, name, base.tensors):
                copies.append(Copy(checkpoint, name, original, True, "the base lacks it; was it trained apart?"))
        for name in sorted(base.tensors.keys() - checkpoint.tensors.keys() - heads):
            if name == _HEAD and _ties_its_head(checkpoint) and (embedding := _embedding(checkpoint)):
                checkpoint.share(name, embedding)
            elif original := find_original(base, name, checkpoint.tensors):
                copies.append(Copy(base, name, original, False, f"{checkpoint.path} lacks it; is it whole?"))
                checkpoint.share(name, original)
    return tuple(copies)


def find_original(checkpoint: Checkpoint, name: str, among: Iterable[str]) -> str | None:
    """Return the first tensor of `among`, outside of the layers, that equals tensor `name`; None if none does."""
    if split_layer(name) is not None:
        return None
    candidates = (x for x in among if x != name and x in checkpoint.tensors and split_layer(x) is None)
    return next((x for x in candidates if seem_equal(checkpoint, name, x)), None)


def seem_equal(checkpoint: Checkpoint, name: str, original: str) -> bool:
    """Whether two tensors have the same dtype, shape and values; of large tensors two rows are compared."""
    header, other = checkpoint.tensors.get(name), checkpoint.tensors.get(original)
    if header is None or other is None:
        return False
    if (header.shape, header.dtype) != (other.shape, other.dtype) or header.dtype not in FLOAT_DTYPES:
        return False
    middle = header.shape[0] // 2 if header.shape else 0
    pieces = [None] if header.nbytes <= _SMALL else [(0, 1), (middle, middle + 1)]
    return all(torch.equal(checkpoint.load(name, rows=rows), checkpoint.load(original, rows=rows)) for rows in pieces)


def shared_seeds(base: Checkpoint, others: Sequence[Checkpoint]) -> dict[str, str]:
    """Map each tensor that is a copy in all checkpoints to its original, whose name seeds its random masks.

    The original is the alphabetically last name of a tensor, as in `tied_names`.
    """
    found: dict[str, str] = {}
    originals: list[str] = []
    for name in sorted(base.tensors, reverse=True):
        original = find_original(base, name, originals)
        if original and all(seem_equal(checkpoint, name, original) for checkpoint in others):
            found[name] = original
        else:
            originals.append(name)
    return found


def _tied_heads(base: Checkpoint, checkpoints: Sequence[Checkpoint]) -> list[Copy]:
    embedding = _embedding(base)
    if not base.config.get("tie_word_embeddings") or embedding is None:
        return []
    why = (
        "the base ties them; set tie_word_embeddings to false in the base's config.json and store its head, "
        "or retie this model"
    )
    return [
        Copy(checkpoint, _HEAD, embedding, True, why)
        for checkpoint in checkpoints
        if _HEAD in checkpoint.tensors and embedding in checkpoint.tensors
    ]


def _ties_its_head(checkpoint: Checkpoint) -> bool:
    text = checkpoint.config.get("text_config")
    inner = text.get("tie_word_embeddings") if isinstance(text, dict) else None
    return bool(checkpoint.config.get("tie_word_embeddings", inner))


def _embedding(checkpoint: Checkpoint) -> str | None:
    found = [name for name in checkpoint.tensors if name.endswith(_EMBEDDINGS)]
    return found[0] if len(found) == 1 else None
