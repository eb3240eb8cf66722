"""Check that models share a vocabulary, so that a recipe's `tokenizer_source` moves no row of an embedding."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..files import read_regular
from .checksums import checksum
from .headers import MAX_JSON_BYTES, read_json
from .reader import Checkpoint

# Files of vocabularies, the most informative first. For the last one, only the bytes are compared.
_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model")


def check_same_vocabulary(base: Checkpoint, tuned: Sequence[Checkpoint]) -> None:
    """Require that every model gives each token the same id as the base.

    Raises:
        CheckpointError: a model differs, or has no tokenizer to compare; the message names the model and the token.
    """
    for checkpoint in dict.fromkeys(tuned):
        if checkpoint is base:
            continue
        folders = [model.main for model in (base, checkpoint) if model.main]
        name = next((name for name in _FILES if all((folder / name).is_file() for folder in folders)), None)
        if name is None or len(folders) < 2:
            raise CheckpointError(
                f"{checkpoint.path} and the base {base.path} have no tokenizer file in common ({', '.join(_FILES)}), "
                "by which tokenizer_source could be checked; remove it to keep every row where it is"
            )
        expected, found = (_token_ids(folder / name) for folder in folders)
        if expected != found:
            token = next(token for token in (*expected, *found) if expected.get(token) != found.get(token))
            raise CheckpointError(
                f"{checkpoint.path}: {token!a:.80} has id {found.get(token)} in {name}, in the base "
                f"{expected.get(token)}; models of different vocabularies are not supported: align them with "
                "mergekit-tokensurgeon, or remove tokenizer_source to keep every row where it is"
            )


def _token_ids(file: Path) -> dict[str, Any]:
    """Return the ids of all tokens; the checksum of a file that is not JSON."""
    if file.suffix != ".json":
        return {file.name: checksum(read_regular(file, MAX_JSON_BYTES))}
    content, _ = read_json(file)
    if file.name == "vocab.json":
        return content
    model, added = content.get("model") or {}, content.get("added_tokens") or []
    try:
        vocabulary = model.get("vocab") or {}
        # Unigram models list pairs of token and score, in the order of the ids.
        ids = vocabulary if isinstance(vocabulary, dict) else {item[0]: i for i, item in enumerate(vocabulary)}
        return ids | {item["content"]: item["id"] for item in added}
    except (AttributeError, KeyError, IndexError, TypeError) as error:
        raise CheckpointError(f"{file}: not a tokenizer file as expected: {error!r}") from error
