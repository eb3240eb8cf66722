"""Make the tokenizer and the configurations of an output fit its vocabulary."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..checkpoint import (
    SIDECAR_FOLDERS,
    Checkpoint,
    embedding_height,
    is_tokenizer_file,
    read_json,
    read_tokenizer_json,
    text_config,
)
from ..checkpoint.headers import merges_of
from ..errors import CheckpointError
from ..files import copy_file, write_json, write_text
from ..plan import AlignedVocabulary
from .sidecar_files import copy_files

_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
# Files of older tokenizers, which hold the model's own tokens without those that a union adds.
_OLDER = ("vocab.json", "vocab.txt", "merges.txt", "*.model", "*.spm", "*.tiktoken")
_GENERATION = "generation_config.json"
_ID_ENDINGS = ("_token_id", "_token_ids", "_token_index")


def fit_vocabulary(vocabulary: AlignedVocabulary, base: Checkpoint, stage: Path) -> None:
    """Change the files that were copied from the base: tokenizer, ``vocab_size`` and the ids of special tokens.

    Args:
        vocabulary: of the output.
        base: the base.
        stage: folder of the output, with the sidecar files of the base.

    Raises:
        CheckpointError: a file cannot be read, or ids cannot be written.
        OSError: the stage cannot be written.
    """
    assert base.folder is not None
    assert base.main is not None
    folder = stage / base.main.relative_to(base.folder)
    owner = vocabulary.owner
    ids: dict[int, int] | None = None
    if owner is not base:
        assert owner.main is not None
        _replace_tokenizer(owner.main, folder)
        ids = dict(vocabulary.moved)
        if not (folder / _GENERATION).is_file() and (owner.main / _GENERATION).is_file():
            copy_file(owner.main / _GENERATION, folder / _GENERATION)
    if vocabulary.added:
        try:
            _add_tokens(vocabulary, folder)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{base.main}: its tokenizer is not as expected: {error!r}") from error
    for name in ("config.json", _GENERATION):
        if not (folder / name).is_file():
            continue
        before = config = read_json(folder / name)[0]
        if ids is not None:
            given = read_json(owner.main / name)[0] if owner.main and (owner.main / name).is_file() else {}
            config = _with_ids(config, given, ids)
        if name == "config.json" and vocabulary.height != embedding_height(base):
            config = _with_height(config, vocabulary.height)
        if config != before:
            write_json(folder / name, config)


def _replace_tokenizer(source: Path, folder: Path) -> None:
    for file in folder.iterdir():
        if file.is_file() and is_tokenizer_file(file.name):
            file.unlink()
    copy_files(source, folder, is_tokenizer_file)
    templates = SIDECAR_FOLDERS[0]
    shutil.rmtree(folder / templates, ignore_errors=True)
    copy_files(source / templates, folder / templates)


def _with_height(config: dict[str, Any], height: int) -> dict[str, Any]:
    """Return a config with the number of rows as ``vocab_size``, wherever the config has it or would have it."""
    text = text_config(config)
    if text is config:
        return {**config, "vocab_size": height}
    key = next(key for key, value in config.items() if value is text)
    changed = {**config, key: {**text, "vocab_size": height}}
    return {**changed, "vocab_size": height} if "vocab_size" in config else changed


def _with_ids(config: Mapping[str, Any], owner: Mapping[str, Any], ids: Mapping[int, int]) -> dict[str, Any]:
    """Return a config with the token ids of the owner's; those that it lacks move with their tokens, or are dropped."""
    changed = {key: value for key, value in owner.items() if key.endswith(_ID_ENDINGS)}
    for key, value in config.items():
        if isinstance(value, dict):
            inner = owner.get(key)
            changed[key] = _with_ids(value, inner if isinstance(inner, dict) else {}, ids)
        elif not key.endswith(_ID_ENDINGS) or (value is None and key not in owner):
            changed[key] = value
        elif key not in owner and all(index in ids for index in (value if isinstance(value, list) else [value])):
            changed[key] = [ids[index] for index in value] if isinstance(value, list) else ids[value]
    return changed


def _add_tokens(vocabulary: AlignedVocabulary, folder: Path) -> None:
    """Add the tokens of other models to the base's tokenizer."""
    file = folder / "tokenizer.json"
    entries = {
        token: {"id": new.index, "content": token, **_flags(new.entry)}
        for token, new in vocabulary.added.items()
        if new.entry is not None
    }
    pieces = {token: new.index for token, new in vocabulary.added.items() if new.entry is None}
    # Merges are most of the file; as a text they take a tenth of the memory.
    content = read_tokenizer_json(file, merges=bool(pieces))[0]
    content["added_tokens"] = [*(content.get("added_tokens") or []), *entries.values()]
    if pieces:
        unique = {new.file: None for new in vocabulary.added.values()}
        _add_pieces(content["model"], pieces, list(unique))
        for kind in _OLDER:
            for older in folder.glob(kind):
                older.unlink()
    _fix_ids(file, content)
    _write_tokenizer(file, content, with_merges=bool(pieces))
    if (folder / "tokenizer_config.json").is_file():
        config = read_tokenizer_json(folder / "tokenizer_config.json")[0]
        declared = {str(entry["id"]): {k: v for k, v in entry.items() if k != "id"} for entry in entries.values()}
        if "added_tokens_decoder" in config:  # transformers 5 leaves it out
            config["added_tokens_decoder"] = {**(config["added_tokens_decoder"] or {}), **declared}
            write_json(folder / "tokenizer_config.json", config)
    if (folder / "added_tokens.json").is_file():
        added = read_json(folder / "added_tokens.json")[0]
        write_json(folder / "added_tokens.json", added | {token: entry["id"] for token, entry in entries.items()})


def _write_tokenizer(file: Path, content: Mapping[str, Any], with_merges: bool) -> None:
    """Replace the content of a tokenizer; unless it has the merges, those of the file stay."""
    text = json.dumps(content).encode()
    first, last = merges_of(text)
    if last and not with_merges:
        before = file.read_bytes()
        begin, end = merges_of(before)
        text = text[:first] + before[begin:end] + text[last:]
    write_text(file, text.decode("utf-8"))


def _flags(entry: Mapping[str, Any]) -> dict[str, bool]:
    default = {"normalized": not entry.get("special", False)}
    return {key: bool(entry.get(key, default.get(key, False))) for key in _FLAGS}


def _add_pieces(model: dict[str, Any], pieces: Mapping[str, int], others: Sequence[Path]) -> None:
    """Add pieces to the tokenizer's own, and the merges that make them after its own."""
    model["vocab"] = {**model["vocab"], **pieces}
    if "merges" not in model:
        return
    known = set(map(_pair, model["merges"]))
    as_text = bool(model["merges"]) and isinstance(model["merges"][0], str)
    for file in others:
        other = read_tokenizer_json(file)[0].get("model") or {}
        for merge in map(_pair, other.get("merges") or []):
            if "".join(merge) in pieces and merge not in known and all(part in model["vocab"] for part in merge):
                known.add(merge)
                model["merges"].append(" ".join(merge) if as_text else list(merge))


def _pair(merge: object) -> tuple[str, ...]:
    return tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge)  # type: ignore[arg-type]


def _fix_ids(file: Path, content: dict[str, Any]) -> None:
    """Give added tokens the ids that they say: the library counts on from the last one, unless the model has the token.

    Raises:
        CheckpointError: the model cannot take the token.
    """
    vocabulary = content["model"].get("vocab") or {}
    own: Mapping[str, int] = vocabulary if isinstance(vocabulary, dict) else {x[0]: i for i, x in enumerate(vocabulary)}
    if all(entry["id"] == found for entry, found in zip(content["added_tokens"], _counted(content, own), strict=True)):
        return
    if not isinstance(vocabulary, dict):
        raise CheckpointError(
            f"{file}: its ids have gaps, so tokens cannot be added to it; use --vocabulary base or --vocabulary "
            "model:PATH"
        )
    content["model"]["vocab"] = {**vocabulary, **{entry["content"]: entry["id"] for entry in content["added_tokens"]}}


def _counted(content: Mapping[str, Any], own: Mapping[str, int]) -> Iterator[int]:
    """Yield the ids that the library gives to the added tokens."""
    last = -1
    for entry in content["added_tokens"]:
        index = own.get(entry["content"], max(last + 1, len(own)))
        last = max(last, index)
        yield index
