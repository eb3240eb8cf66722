"""Find the tensors of a model with one row per token: embeddings and output heads."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ..errors import CheckpointError, ShapeError
from ..ops._checks import FLOAT_DTYPES
from ..parameters import split_layer
from .model_config import text_config
from .reader import Checkpoint

# Last parts of names, of input embeddings.
_EMBEDDINGS = (
    "embed_tokens.weight", "wte.weight", "word_embeddings.weight", "shared.weight", "embed_in.weight",
    "tok_embeddings.weight", "word_embedding.weight", "embeddings.weight", "embedding.weight",
)  # fmt: skip
# Of output heads and their biases.
_HEADS = (
    "lm_head.weight", "lm_head.bias", "embed_out.weight", "proj_out.weight", "shared_head.head.weight",
    "predictions.bias", "predictions.decoder.weight", "predictions.decoder.bias", "lm_head.decoder.weight",
    "lm_head.decoder.bias", "generator_lm_head.weight", "generator_lm_head.bias",
)  # fmt: skip
# Of biases with tokens as columns, (1, n).
_COLUMNS = "final_logits_bias"


def embedding_height(checkpoint: Checkpoint) -> int:
    """Return the number of rows of a model's token embedding, padding included.

    Raises:
        CheckpointError: it has no token embedding that can be told from other tensors.
    """
    stated = text_config(checkpoint.config).get("vocab_size", checkpoint.config.get("vocab_size"))
    outside = {name: shape[0] for name, shape in _shapes(checkpoint).items() if len(shape) == 2 and _outside(name)}
    known = [height for name, height in outside.items() if _ends(name, _EMBEDDINGS)]
    if stated in known or (not known and stated in outside.values()):
        return int(stated)
    if known:
        return known[0]
    raise CheckpointError(
        f"{checkpoint.path}: no token embedding found: expected a tensor such as {_EMBEDDINGS[0]}, or one with the "
        f"{stated} rows of vocab_size; exclude the tensors that differ instead of setting a vocabulary"
    )


def vocabulary_tensors(heights: Mapping[Checkpoint, int], excluded: Callable[[str], bool]) -> frozenset[str]:
    """Return the names of the tensors with one row per token, in any model.

    They have the known names of embeddings and heads; or their numbers of rows differ between models, as the
    vocabularies do; or they are matrices outside of the layers with the embedding's shape, or biases of its height.

    Args:
        heights: the models, each with the number of rows of its embedding.
        excluded: whether a tensor takes no part in the merge; it may have any number of rows.

    Raises:
        ShapeError: such a tensor has another number of rows than the embedding of its model.
    """
    found: set[str] = set()
    shapes = {checkpoint: _shapes(checkpoint) for checkpoint in heights}
    for checkpoint, height in heights.items():
        widths = {s[1] for name, s in shapes[checkpoint].items() if _ends(name, _EMBEDDINGS) and s[0] == height}
        for name, shape in shapes[checkpoint].items():
            bias = shape == (height,) and name.endswith("bias") and height not in widths
            like = _outside(name) and (bias or (len(shape) == 2 and shape[1] in widths - {height}))
            if shape[0] == height and (_ends(name, (*_EMBEDDINGS, *_HEADS)) or like):
                found.add(name)
    for name in {name for own in shapes.values() for name in own}:
        rows = {x: own[name][0] for x, own in shapes.items() if name in own}
        if len(set(rows.values())) > 1 and all(height == heights[x] for x, height in rows.items()):
            found.add(name)
    for name in sorted(name for own in shapes.values() for name in own):
        if name.endswith(_COLUMNS) and not excluded(name):
            raise ShapeError(f"{name} has one column for each token, and only rows are aligned; exclude it")
    for name in sorted(found):
        if excluded(name):
            continue
        for checkpoint, own in shapes.items():
            if name in own and own[name][0] != heights[checkpoint]:
                raise ShapeError(
                    f"{checkpoint.path}: {name} has {own[name][0]} rows, the vocabulary {heights[checkpoint]}; exclude "
                    "it if it is no embedding of these tokens"
                )
    return frozenset(found)


def _shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    return {
        name: header.shape
        for name, header in checkpoint.tensors.items()
        if header.shape and header.dtype in FLOAT_DTYPES
    }


def _outside(name: str) -> bool:
    return split_layer(name) is None


def _ends(name: str, endings: tuple[str, ...]) -> bool:
    return any(name == ending or name.endswith(f".{ending}") for ending in endings)
