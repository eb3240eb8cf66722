"""Align the vocabularies of models by their tokens: which row of each model belongs to which row of the output."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import (
    Checkpoint,
    Tokenizer,
    embedding_height,
    read_tokenizer,
    same_tokenizer,
    vocabulary_tensors,
)
from ..config import MergeConfig
from ..errors import CheckpointError, ConfigError
from ..lora.adapted_model import AdaptedModel
from ..recipe_forms import MERGEKIT_RUNS_IT
from ..text import some
from ..treatments import is_excluded

# Heights of padded embeddings are multiples of powers of two up to this one.
_LARGEST_MULTIPLE = 128
_EXAMPLES = 5


@dataclass(frozen=True)
class AddedToken:
    """A token of a union that the base lacks.

    Attributes:
        index: its id in the output.
        file: the tokenizer that it is from.
        entry: its flags there; None for a piece of the tokenizer's model.
    """

    index: int
    file: Path
    entry: Mapping[str, Any] | None


@dataclass(frozen=True)
class TokenGroup:
    """Rows of the output that come from the same models.

    Attributes:
        rows: ``merged`` (by the method), ``base``, ``model`` (the only one that knows them), ``mean`` (of the models
            that know them, where the base does not), or ``padding``.
        models: the models whose rows they are; those of ``merged`` are the models that know the tokens.
        count: number of rows.
        tokens: some of the tokens.
    """

    rows: str
    models: tuple[str, ...]
    count: int
    tokens: tuple[str, ...]


@dataclass(frozen=True)
class AlignedVocabulary:
    """The vocabulary of the output, and where the models have its rows.

    Attributes:
        source: ``base``, ``union`` or ``model:PATH``.
        height: number of rows.
        names: tensors whose rows move; none if every model has every row in its place.
        rows: for each checkpoint its row for each row of the output, int64 (height,); -1 if it has none.
        untouched: rows that are written as they were read, because only the base has them or it lacks them, bool
            (height,).
        averaged: rows of which a model that lacks them has the mean of the others, bool (height,): those that the base
            lacks; without a base, those that any model lacks.
        owner: the checkpoint whose tokenizer files and token ids the output has.
        added: tokens of other models in a union.
        groups: where the rows come from.
        moved: the base's rows of tokens, and those of the output.
        notes: what was assumed.
        tokens_read: number of tokens of all tokenizers.
    """

    source: str
    height: int
    names: frozenset[str]
    rows: Mapping[Checkpoint, Tensor]
    untouched: Tensor
    averaged: Tensor
    owner: Checkpoint
    added: Mapping[str, AddedToken] = field(default_factory=dict)
    groups: tuple[TokenGroup, ...] = ()
    moved: Mapping[int, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    tokens_read: int = 0

    def moves_base(self, base: Checkpoint) -> bool:
        """Whether the rows of the output are others than those of the base."""
        return not torch.equal(self.rows[base], torch.arange(self.height, device="cpu"))

    def lines(self) -> list[str]:
        """Say in words where the rows come from."""
        words = {
            "merged": "merged, known to",
            "base": "of the base",
            "mean": "are the mean of",
            "padding": "of padding",
        }
        found = [f"vocabulary {self.source}: {self.height} rows, {len(self.added)} tokens more than the base's"]
        for group in self.groups:
            text = f"{group.count} rows {words.get(group.rows, 'of')} {' and '.join(group.models)}".rstrip()
            found.append(f"{text} ({', '.join(map(repr, group.tokens))}{', ...' * (group.count > len(group.tokens))})"
                         if group.tokens else text)  # fmt: skip
        return found

    def summary(self) -> dict[str, Any]:
        """Return what the report says of the vocabulary, as JSON."""
        groups = [
            {"rows": group.rows, "models": list(group.models), "count": group.count, "tokens": list(group.tokens)}
            for group in self.groups
        ]
        return {
            "source": self.source,
            "rows": self.height,
            "added": len(self.added),
            "groups": groups,
            "lines": self.lines(),
        }


def align_vocabularies(
    config: MergeConfig, base: Checkpoint, tuned: Sequence[Checkpoint | AdaptedModel], inputs: Sequence[Checkpoint]
) -> AlignedVocabulary:
    """Read the tokenizers and choose the rows of the output.

    Args:
        config: a recipe with a `vocabulary`.
        base: the base.
        tuned: the models, one for each entry of `config.models`.
        inputs: all checkpoints, the base first.

    Raises:
        CheckpointError: a model has no tokenizer that can be read, or embeddings of other heights than expected.
        ConfigError: the recipe's model is none of the inputs, or the vocabularies cannot be united.
    """
    source = str(config.vocabulary)
    heights = {checkpoint: embedding_height(checkpoint) for checkpoint in inputs}
    named = source.removeprefix("model:")
    owner = base if source in ("base", "union") else _named(named, config, base, tuned, f"vocabulary: {source}")
    multiple = config.pad_to_multiple_of or 1
    has_base = config.base_model is not None
    alike = len(set(heights.values())) == 1 and all(same_tokenizer(base, other) for other in inputs[1:])
    if alike and not config.tokens and heights[base] % multiple == 0:
        return _unmoved(source, owner, inputs, heights[base])
    notes: list[str] = []
    tokenizers = dict(_tokenizers(base, inputs, heights, notes))
    ids, height = dict(tokenizers[owner].ids), heights[owner]
    added = _new_tokens(owner, tokenizers, heights, list(config.tokens), source == "union")
    ids |= {token: new.index for token, new in added.items()}
    height = _united_height(tokenizers[owner], height, max(ids.values()) + 1) if added else height
    height = -(-height // multiple) * multiple
    rows = {x: _rows(ids, height, tokenizers[x].ids, heights[x]) for x in inputs}
    moved = {row: index for index, row in enumerate(rows[base].tolist()) if row >= 0}
    for token, choice in config.tokens.items():
        chosen = _named(choice.model, config, base, tuned, f"tokens: {token!r} is from {choice.model}, which")
        row = _row_of(token, choice.token, tokenizers[chosen], heights[chosen])
        if choice.force or any(rows[x][ids[token]] < 0 for x in (inputs[:1] if has_base else inputs)):
            for own in rows.values():
                own[ids[token]] = -1
            rows[chosen][ids[token]] = row
    in_place = all(heights[x] == height and torch.equal(rows[x], torch.arange(height, device="cpu")) for x in inputs)
    names = frozenset() if in_place else vocabulary_tensors(heights, lambda name: is_excluded(config, name))
    models = _models(base, tuned, names) if has_base else list(inputs)
    known = torch.stack([torch.zeros(height, dtype=torch.bool, device="cpu"), *(rows[x] >= 0 for x in models)])[1:]
    # Without a base, rows of several models are merged as those that a base has.
    merged = rows[base] >= 0 if has_base else known.sum(0) > 1
    groups = tuple(_groups(ids, height, merged, known, models))
    averaged = rows[base] < 0 if has_base else ~known.all(0) & known.any(0)
    # Rows that nobody has: padding like the base's, or zeros.
    nobody = (rows[base] < 0) & ~known.any(0)
    if spare := sorted(set(range(heights[base])) - set(tokenizers[base].ids.values()))[-1:]:
        rows[base] = rows[base].masked_fill(nobody, spare[0])
    elif int(nobody.sum()):
        notes.append(f"{int(nobody.sum())} rows of the vocabulary are in no model; they are zero")
    untouched = ~merged | ~known.any(0)
    tokens_read = sum(len(tokenizer.ids) for tokenizer in tokenizers.values())
    return AlignedVocabulary(
        source, height, names, rows, untouched, averaged, owner, added, groups, moved, tuple(notes), tokens_read
    )


def _unmoved(source: str, owner: Checkpoint, inputs: Sequence[Checkpoint], height: int) -> AlignedVocabulary:
    """Return the vocabulary of models that share one tokenizer: no row moves."""
    rows = dict.fromkeys(inputs, torch.arange(height, device="cpu"))
    group = TokenGroup("merged", tuple(str(x.path) for x in inputs[1:]), height, ())
    none = torch.zeros(height, dtype=torch.bool, device="cpu")
    return AlignedVocabulary(source, height, frozenset(), rows, none, none, owner, groups=(group,))


def aligned_tensors(
    vocabulary: AlignedVocabulary | None, config: MergeConfig, base: Checkpoint, adapted: Sequence[AdaptedModel]
) -> frozenset[str]:
    """Return the tensors whose rows move, without excluded ones.

    Raises:
        ConfigError: an excluded tensor, or one that an adapter changes, would have to move.
    """
    if vocabulary is None:
        return frozenset()
    excluded = {name for name in vocabulary.names if is_excluded(config, name)}
    if excluded and vocabulary.moves_base(base):
        raise ConfigError(
            f"vocabulary: {min(excluded)} is excluded and keeps the rows of the base, but the output has others; "
            "merge it too, or use --vocabulary base"
        )
    for model in adapted:
        changed = vocabulary.names.intersection(model.modules) - excluded
        if changed and (model.base is not base or vocabulary.moves_base(base)):
            raise ConfigError(
                f"{model.path}: changes {min(changed)}, whose rows the vocabulary moves; merge the adapter into its "
                "model first, or use --vocabulary base"
            )
    return vocabulary.names - excluded


def _tokenizers(
    base: Checkpoint, inputs: Sequence[Checkpoint], heights: Mapping[Checkpoint, int], notes: list[str]
) -> Iterator[tuple[Checkpoint, Tokenizer]]:
    """Yield each checkpoint with its tokenizer; a model of the base's height without one has the base's."""
    own = read_tokenizer(base)
    if own is None:
        raise CheckpointError(f"{base.path}: no tokenizer.json, by which vocabularies are aligned; add it, or exclude "
                              "the embeddings and heads instead of setting a vocabulary")  # fmt: skip
    texts = {token: token for token in own.ids}
    yield base, own
    for checkpoint in inputs[1:]:
        found = read_tokenizer(checkpoint)
        if found is None and heights[checkpoint] != heights[base]:
            raise CheckpointError(
                f"{checkpoint.path}: no tokenizer.json, by which its {heights[checkpoint]} rows could be aligned with "
                f"the base's {heights[base]}; add the model's tokenizer files"
            )
        if found is None:
            notes.append(f"{checkpoint.path}: no tokenizer; it is taken to have the base's")
            yield checkpoint, own
            continue
        # Equal texts share memory.
        ids = {texts.get(token, token): index for token, index in found.ids.items()}
        yield checkpoint, Tokenizer(found.file, ids, found.added, found.kind)


def _models(base: Checkpoint, tuned: Sequence[Checkpoint | AdaptedModel], names: frozenset[str]) -> list[Checkpoint]:
    """Return the checkpoints with rows of their own: the base only if an adapter changes its rows."""
    found: dict[Checkpoint, None] = {}
    for model in tuned:
        origin = model.base if isinstance(model, AdaptedModel) else model
        if origin is not base or (isinstance(model, AdaptedModel) and names.intersection(model.modules)):
            found[origin] = None
    return list(found)


def _named(
    path: str, config: MergeConfig, base: Checkpoint, tuned: Sequence[Checkpoint | AdaptedModel], what: str
) -> Checkpoint:
    """Return the checkpoint of the recipe that a vocabulary names, called `what` in messages."""
    names = [(config.base_model, base), *((entry.model, x) for entry, x in zip(config.models, tuned, strict=True))]
    for name, model in names:
        checkpoint = model.base if isinstance(model, AdaptedModel) else model
        if path in (name, str(checkpoint.path)) or _same_place(path, checkpoint):
            return checkpoint
    raise ConfigError(
        f"{what} is none of the models: {some([str(name) for name, _ in names if name], 8)}; list it, with weight 0 if "
        f"only its tokens are wanted; {MERGEKIT_RUNS_IT}"
    )


def _same_place(path: str, checkpoint: Checkpoint) -> bool:
    try:
        return checkpoint.path.samefile(path)
    except (OSError, ValueError):
        return False


def _row_of(token: str, choice: str | int | None, tokenizer: Tokenizer, height: int) -> int:
    """Return the row of a model that a recipe chooses for a token."""
    wanted = token if choice is None else choice
    row = wanted if isinstance(wanted, int) else tokenizer.ids.get(wanted, height)
    if row >= height:
        raise ConfigError(f"tokens: {token!r}: {tokenizer.file.parent} has no row of {wanted!r}")
    return row


def _new_tokens(
    owner: Checkpoint,
    tokenizers: Mapping[Checkpoint, Tokenizer],
    heights: Mapping[Checkpoint, int],
    listed: Sequence[str],
    everything: bool,
) -> dict[str, AddedToken]:
    """Give tokens that a tokenizer lacks ids after its own, in the order of the models and of their ids there.

    They are those that the recipe lists, or everything that a model has; listed ones that no model has come last.
    """
    own = tokenizers[owner]
    found: dict[str, AddedToken] = {}
    first = max(own.ids.values()) + 1
    for checkpoint, tokenizer in tokenizers.items():
        new = sorted(
            (index, token)
            for token, index in tokenizer.ids.items()
            if token not in own.ids and token not in found and (everything or token in listed)
        )
        for index, token in new:
            if index < heights[checkpoint]:
                found[token] = AddedToken(first + len(found), tokenizer.file, tokenizer.added.get(token))
        pieces = [token for _, token in new if token in found and token not in tokenizer.added]
        kinds = own.kind or "tokenizer", tokenizer.kind or "tokenizer"
        if pieces and (tokenizer.kind != own.kind or own.kind not in ("BPE", "WordPiece", "WordLevel")):
            raise ConfigError(
                f"vocabulary: {checkpoint.path} has {len(pieces)} pieces that the tokenizer of {owner.path} lacks "
                f"({some([ascii(piece) for piece in pieces])}), and a {kinds[0]} model cannot take those of a "
                f"{kinds[1]} model; use --vocabulary base or --vocabulary model:PATH; {MERGEKIT_RUNS_IT}, which adds "
                "them as whole tokens"
            )
    for token in listed:
        if token not in own.ids and token not in found:
            found[token] = AddedToken(first + len(found), own.file, {})
    if found and own.file.name != "tokenizer.json":
        raise ConfigError(
            f"vocabulary: {owner.path} has {own.file.name} but no tokenizer.json, to which tokens can be added; write "
            "it with AutoTokenizer.from_pretrained(...).save_pretrained(...) of transformers"
        )
    return found


def _united_height(own: Tokenizer, height: int, tokens: int) -> int:
    """Return the number of rows of a union: a padded base stays padded to the same multiple."""
    multiple = 1
    if height > max(own.ids.values()) + 1:
        while multiple < _LARGEST_MULTIPLE and height % (2 * multiple) == 0:
            multiple *= 2
    return max(height, -(-tokens // multiple) * multiple)


def _rows(ids: Mapping[str, int], height: int, own: Mapping[str, int], own_height: int) -> Tensor:
    """Return a model's row for each row of the output; padding has its own place in both, if it is padding in both."""
    rows = [-1] * height
    for token, index in ids.items():
        row = own.get(token, -1)
        if index < height and rows[index] < 0 and row < own_height:
            rows[index] = row
    taken, own_taken = set(ids.values()), set(own.values())
    for index in range(min(height, own_height)):
        if index not in taken and index not in own_taken:
            rows[index] = index
    return torch.tensor(rows, dtype=torch.int64, device="cpu")


def _groups(
    ids: Mapping[str, int], height: int, merged: Tensor, known: Tensor, models: Sequence[Checkpoint]
) -> Iterator[TokenGroup]:
    tokens: dict[int, str] = {}
    for token, index in ids.items():
        tokens.setdefault(index, token)
    found: dict[tuple[bool, bool, tuple[int, ...]], list[int]] = {}
    patterns, group_of = torch.unique(torch.cat([merged[None], known]), dim=1, return_inverse=True)
    for index, group in enumerate(group_of.tolist()):
        in_it, *rest = patterns[:, group].tolist()
        key = (index in tokens, in_it, tuple(i for i, has in enumerate(rest) if has))
        found.setdefault(key, []).append(index)
    padding = 0
    for (is_token, in_it, having), indexes in found.items():
        if not is_token:
            padding += len(indexes)
            continue
        kind = "merged" if in_it and having else "base" if in_it else ("model", "mean")[len(having) > 1]
        names = tuple(str(models[i].path) for i in having)
        yield TokenGroup(kind, names, len(indexes), tuple(tokens[index] for index in indexes[:_EXAMPLES]))
    if padding:
        yield TokenGroup("padding", (), padding, ())


def moved_tokens(base: Checkpoint, model: Checkpoint) -> str | None:
    """Return a note if a model has tokens of the base under other ids, whose rows a merge without alignment mixes up.

    Args:
        base: the base.
        model: a model whose rows are not aligned.
    """
    try:
        if same_tokenizer(base, model):
            return None
        own, other = read_tokenizer(base), read_tokenizer(model)
    except CheckpointError:  # the tokens are not needed otherwise
        return None
    if own is None or other is None:
        return None
    moved = [token for token, index in own.ids.items() if other.ids.get(token, index) != index]
    if not moved:
        return None
    return (
        f"{model.path}: {len(moved)} of its tokens have other ids than in the base ({some(moved)}), so rows of "
        "different tokens are merged; --vocabulary base aligns them"
    )
