"""Read the tokens of a model and their ids from the files of its tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..files import read_regular
from .headers import MAX_JSON_BYTES, FileState, file_state, read_json, read_tokenizer_json
from .reader import Checkpoint

# Files that only the libraries of their makers can read.
_FOREIGN = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "source.spm", "tekken.json")
_FOREIGN_ENDINGS = (".tiktoken", ".model", ".spm")
# The files with the tokens' ids, of which a model needs one.
_READ = ("tokenizer.json", "vocab.json", "vocab.txt")
# Far above any vocabulary, so that a hostile id allocates no memory to speak of.
_MOST_IDS = 10_000_000


@dataclass(frozen=True)
class Tokenizer:
    """The tokens of a model.

    Attributes:
        file: the file with most of them.
        ids: id by token, as text.
        added: tokens beside the model's own, with their flags, by token.
        kind: class of the tokenizer's model, such as ``BPE``; empty if unknown.
    """

    file: Path
    ids: Mapping[str, int]
    added: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    kind: str = ""


def read_tokenizer(checkpoint: Checkpoint) -> Tokenizer | None:
    """Read the tokenizer beside a checkpoint; the checkpoint watches the files from then on.

    Returns:
        The tokenizer, or None if there is none.

    Raises:
        CheckpointError: a file is damaged, or only the library of its makers can read it.
    """
    folder = checkpoint.main
    if folder is None:
        return None
    beside = _beside(checkpoint, folder)
    for name, read in zip(_READ, (_whole, _plain, _lines), strict=True):
        file = folder / name
        if not file.is_file():
            continue
        try:
            found, state = read(file)
        except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
            raise CheckpointError(f"{file}: not a tokenizer file as expected: {error!r}") from error
        checkpoint.watch(state)
        added = {**{token: entry for token, (_, entry) in beside.items()}, **found.added}
        ids = {token: index for token, (index, _) in beside.items()} | dict(found.ids)
        if not ids or not all(isinstance(x, str) and type(i) is int and 0 <= i < _MOST_IDS for x, i in ids.items()):
            raise CheckpointError(f"{file}: not a tokenizer file as expected: no tokens, or ids that are none")
        return Tokenizer(file, ids, added, found.kind)
    foreign = [file.name for file in sorted(folder.iterdir()) if _is_foreign(file.name)]
    if foreign:
        raise CheckpointError(
            f"{folder}: has {foreign[0]} but no tokenizer.json, from which tokens are read; write it with "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...) of transformers"
        )
    return None


def same_tokenizer(checkpoint: Checkpoint, other: Checkpoint) -> bool:
    """Whether two models have the same file of tokens, byte by byte, in any format; both watch their files then."""
    if checkpoint.main is None or other.main is None:
        return False
    name = next((name for name in (*_READ, *_FOREIGN) if (checkpoint.main / name).is_file()), None)
    if name is None or not (other.main / name).is_file():
        return False
    contents = []
    for model, folder in ((checkpoint, checkpoint.main), (other, other.main)):
        state = _bytes(folder / name)[1]
        model.watch(state)
        beside = _beside(model, folder)
        contents.append((state.header_checksum, {token: index for token, (index, _) in beside.items()}))
    return contents[0] == contents[1]


def _beside(checkpoint: Checkpoint, folder: Path) -> dict[str, tuple[int, Mapping[str, Any]]]:
    """Return the tokens, with their ids and flags, that files beside that of a tokenizer's model add."""
    found: dict[str, tuple[int, Mapping[str, Any]]] = {}
    for name in ("added_tokens.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            content, state = read_tokenizer_json(folder / name)
            checkpoint.watch(state)
            plain = name == "added_tokens.json"
            found |= {x: (i, {}) for x, i in content.items()} if plain else dict(_declared(content))
    return found


def _is_foreign(name: str) -> bool:
    return name in _FOREIGN or name.endswith(_FOREIGN_ENDINGS)


def _whole(file: Path) -> tuple[Tokenizer, FileState]:
    """Read ``tokenizer.json``."""
    content, state = read_tokenizer_json(file, merges=False)
    model, entries = content.get("model") or {}, content.get("added_tokens") or []
    vocabulary = model.get("vocab") or {}
    # Unigram models list pairs of token and score, in the order of the ids.
    ids = vocabulary if isinstance(vocabulary, dict) else {token: i for i, (token, _) in enumerate(vocabulary)}
    added = {item["content"]: item for item in entries}
    # Older files do not name the class.
    kind = model.get("type") or ("BPE" if "merges" in model else "Unigram" if isinstance(vocabulary, list) else "")
    return Tokenizer(file, ids | {item["content"]: item["id"] for item in entries}, added, str(kind)), state


def _plain(file: Path) -> tuple[Tokenizer, FileState]:
    """Read ``vocab.json``."""
    ids, state = read_json(file)
    return Tokenizer(file, ids, {}, "BPE"), state


def _lines(file: Path) -> tuple[Tokenizer, FileState]:
    """Read ``vocab.txt``, whose lines are the tokens in the order of their ids."""
    raw, state = _bytes(file)
    tokens = raw.decode("utf-8").removesuffix("\n").split("\n")
    return Tokenizer(file, {token.rstrip("\r"): i for i, token in enumerate(tokens)}, {}, "WordPiece"), state


def _bytes(file: Path) -> tuple[bytes, FileState]:
    try:
        raw = read_regular(file, MAX_JSON_BYTES)
        return raw, file_state(file, file.stat(), raw)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror or error}") from error


def _declared(config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, Mapping[str, Any]]]]:
    """Yield the tokens of ``added_tokens_decoder`` with their ids and flags."""
    entries = config.get("added_tokens_decoder")
    for index, entry in entries.items() if isinstance(entries, dict) else ():
        if isinstance(entry, dict) and isinstance(entry.get("content"), str) and index.isdecimal() and len(index) < 20:
            yield entry["content"], (int(index), entry)
