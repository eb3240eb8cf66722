"""Match names that differ in the prefix of a model class: ``bert.encoder.x`` and ``encoder.x``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

# Parts of names that model classes, and wrappers around models, put before the names of the same tensors.
_WRAPPERS = frozenset((
    "model", "transformer", "language_model", "llm", "base_model", "backbone", "module", "_orig_mod",
    "bert", "roberta", "distilbert", "electra", "deberta", "albert", "mpnet", "longformer", "esm", "gpt_neox", "rwkv",
    "mobilebert", "ernie", "rembert", "roformer", "funnel", "fnet", "nystromformer", "canine", "luke", "biogpt",
    "layoutlm", "layoutlmv2", "layoutlmv3", "data2vec_text", "wav2vec2", "hubert", "wavlm", "vit", "deit", "beit",
    "swin", "swinv2", "dinov2", "convnext",
))  # fmt: skip


def without_prefix(name: str) -> str:
    """Return a tensor's name without the prefixes of model classes.

    Examples:
        >>> without_prefix("model.language_model.layers.0.w"), without_prefix("language_model.lm_head.weight")
        ('layers.0.w', 'lm_head.weight')
    """
    parts = name.split(".")
    first = next((index for index, part in enumerate(parts) if part not in _WRAPPERS), len(parts) - 1)
    return ".".join(parts[first:])


def same_but_for_prefix(names: Iterable[str], known: Iterable[str]) -> dict[str, str]:
    """Match names that are not known to known names that are not taken, where they differ in a prefix only.

    Args:
        names: names of one model.
        known: names of another.

    Returns:
        The known name by name. A name is left out if several of either side are alike.

    Examples:
        >>> same_but_for_prefix(["bert.encoder.w", "head.w"], ["encoder.w", "head.w"])
        {'bert.encoder.w': 'encoder.w'}
    """
    names, known = set(names), set(known)
    mine, theirs = _by_core(names - known), _by_core(known - names)
    return {
        alike[0]: theirs[core][0]
        for core, alike in sorted(mine.items())
        if len(alike) == 1 and len(theirs.get(core, ())) == 1
    }


def _by_core(names: Iterable[str]) -> Mapping[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(without_prefix(name), []).append(name)
    return found
