"""Where the layers of a model are: the prefix of their names, their number, and the tensors before and after them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from ..checkpoint import Checkpoint, layer_count
from ..errors import ConfigError
from ..parameters import split_layer
from ..text import some

# Parts of the names of embeddings, which come before the layers; all other tensors outside the layers come after them.
_BEFORE = re.compile(r"(^|[._])(embed|embd|wte|wpe|shared|relative_pe|class_embedding|patch_conv|conv1|conv2|ln_pre)")
_AFTER = re.compile(r"(^|\.)(embed_out|unembed|lm_head|output)\b")


@dataclass(frozen=True)
class Layers:
    """The layers of the models of a recipe.

    Attributes:
        prefix: of the names of all tensors in layers, such as ``model.layers.``.
        others: prefixes of other layers, such as those of an image encoder.
    """

    prefix: str
    others: tuple[str, ...] = ()

    @classmethod
    def find(cls, checkpoint: Checkpoint, names: Iterable[str]) -> Layers:
        """Find the layers among some tensors of a model.

        Raises:
            ConfigError: there are none, or several sequences of layers, and the config does not tell which is meant.
        """
        counts = _counts(names)
        known = layer_count(checkpoint.config)
        fitting = [prefix for prefix, count in counts.items() if known and count in (known[0], sum(known))]
        chosen = list(counts) if len(counts) == 1 else fitting
        if len(chosen) != 1:
            places = some([f"{prefix}0-{count - 1}" for prefix, count in counts.items()], 6) or "none"
            raise ConfigError(
                f"slices: {checkpoint.path} has several sequences of layers, or none ({places}); name one under "
                "`modules`, as in `modules: {text_decoder: {slices: ...}}`"
            )
        return cls(chosen[0], tuple(prefix for prefix in counts if prefix != chosen[0]))

    def count(self, checkpoint: Checkpoint, names: Iterable[str]) -> int:
        """Return the number of layers of a model, without those behind them that predict further tokens.

        Raises:
            ConfigError: the model has no such layers.
        """
        count = _counts(names).get(self.prefix, 0)
        if not count:
            raise ConfigError(f"slices: {checkpoint.path} has no layers {self.prefix}0, ...")
        layers, further = layer_count(checkpoint.config) or (count, 0)
        return layers if count == layers + further else count

    def place(self, name: str, count: int) -> tuple[str, int]:
        """Return where a tensor is: ``before``, ``layer`` with its index, ``further`` with its index, or ``after``.

        Args:
            name: of the tensor.
            count: number of layers of its model.
        """
        split = split_layer(name)
        if split is not None and split[0] == self.prefix:
            return ("layer", split[1]) if split[1] < count else ("further", split[1] - count)
        beside = any(name.startswith(other.rpartition(".")[0].rpartition(".")[0] + ".") for other in self.others)
        before = beside or (_BEFORE.search(name) is not None and not _AFTER.search(name))
        return ("before" if before else "after"), 0

    def renamed(self, name: str, index: int) -> str:
        """Return the name of the same tensor of layer `index`."""
        split = split_layer(name)
        assert split is not None
        rest = f".{split[2]}" if split[2] else ""
        return f"{self.prefix}{index}{rest}"


def _counts(names: Iterable[str]) -> dict[str, int]:
    """Return the number of layers by prefix."""
    found: dict[str, int] = {}
    for split in filter(None, map(split_layer, names)):
        found[split[0]] = max(found.get(split[0], 0), split[1] + 1)
    return found


def suffixes(prefix: str, names: Collection[str]) -> dict[str, str]:
    """Return the names of tensors, with the layers of one prefix made the same."""
    found = {}
    for name in names:
        split = split_layer(name)
        found[name] = f"{prefix}*.{split[2]}" if split is not None and split[0] == prefix else name
    return found
