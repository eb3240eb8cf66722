"""Rewrite forms of mergekit's recipes that mean the same as the fields of `MergeConfig`."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from .errors import ConfigError
from .methods import METHODS
from .text import printable, shortened

_LOG = logging.getLogger(__name__)

_TOKENIZER_ADVICE = {
    "tokens": ": the rows of single tokens cannot be chosen; `rtsvm mergekit yaml` runs such a recipe",
    "pad_to_multiple_of": ": a union keeps the padding of the base; `rtsvm mergekit yaml` runs such a recipe",
}
_UNSUPPORTED = {
    "modules": "multi-module recipes are not supported; merge one module at a time, under `models`",
    "chat_template": "setting a chat template is not supported; the one of the base is copied",
}

# Parameters of mergekit's methods. It ignores those that the method of a recipe does not read.
_MERGEKIT = frozenset((
    "weight", "density", "lambda", "normalize", "int8_mask", "rescale", "gamma", "epsilon", "t", "select_topk",
    "filter_wise", "random_seed", "max_iter", "tol", "eps",
))  # fmt: skip


def from_mergekit(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe without what is only mergekit's.

    Raises:
        ConfigError: it asks for what is not supported.
    """
    found = _without_unread(with_models(with_vocabulary(data)))
    for key, advice in _UNSUPPORTED.items():
        if found.get(key) is not None:
            raise ConfigError(f"{key}: {advice}")
    return {key: value for key, value in found.items() if not is_note(key)}


def has_names(value: object) -> bool:
    """Whether a value is a mapping with text as keys."""
    return isinstance(value, Mapping) and all(isinstance(key, str) for key in value)


def is_note(key: str) -> bool:
    """Whether a key of a recipe is ignored: its title, or a place for YAML anchors."""
    return key == "name" or key.startswith("x-")


def with_vocabulary(data: Mapping[str, Any]) -> Mapping[str, Any]:
    """Write mergekit's ``tokenizer_source``, and its newer ``tokenizer: {source: ...}``, as ``vocabulary``.

    Raises:
        ConfigError: it asks for more than the vocabulary of the output.
    """
    old, new = data.get("tokenizer_source"), data.get("tokenizer")
    if old is None and new is None:
        return data
    given = [key for key in ("vocabulary", "tokenizer_source", "tokenizer") if data.get(key) is not None]
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)}: a recipe has one of them")
    if new is not None:
        if not isinstance(new, Mapping):
            raise ConfigError(f"tokenizer: expected a mapping with `source`, got {shortened(new)}")
        for key, value in new.items():
            if key != "source" and value is not None:
                raise ConfigError(f"tokenizer: {key} is not supported{_TOKENIZER_ADVICE.get(key, '')}")
        old = new.get("source") or "union"  # mergekit's default
    if not isinstance(old, str):
        raise ConfigError(f"{given[0]}: expected base, union or the path of a model, got {shortened(old)}")
    source = old if old in ("base", "union") else f"model:{old.removeprefix('model:')}"
    return {**data, "tokenizer": None, "tokenizer_source": None, "vocabulary": source}


def with_models(data: Mapping[str, Any]) -> Mapping[str, Any]:
    """Write ``slices`` of whole models as ``models``; refuse any other slices."""
    slices = data.get("slices")
    if slices is None:
        return data
    advice = "only one slice of whole models, `layer_range: [0, number of layers]` for each, is supported"
    if data.get("models") is not None:
        raise ConfigError("slices: a recipe has either `slices` or `models`")
    if not (isinstance(slices, list) and len(slices) == 1 and isinstance(slices[0], Mapping)):
        raise ConfigError(f"slices: {advice}; got {len(slices) if isinstance(slices, list) else slices!r} slices")
    (whole,) = slices
    sources = whole.get("sources")
    for key in whole:
        if key not in ("sources", "base_model", "parameters"):
            raise ConfigError(f"slices: {key} is not supported")
    if not isinstance(sources, list) or not all(isinstance(source, Mapping) for source in sources) or not sources:
        raise ConfigError("slices: `sources` is a list of `model` and `layer_range`")
    ranges = [source.get("layer_range") for source in sources]
    first, last = ranges[0] if isinstance(ranges[0], list) and len(ranges[0]) == 2 else (None, None)
    if any(found != ranges[0] for found in ranges) or first != 0 or type(last) is not int or last < 1:
        raise ConfigError(f"slices: {advice}; got {ranges}")
    own = {"models": [{key: value for key, value in source.items() if key != "layer_range"} for source in sources]}
    parameters: dict[str, Any] = {}
    for given in (data.get("parameters"), whole.get("parameters")):  # those of the slice take precedence
        if not isinstance(given or {}, Mapping):
            raise ConfigError(f"parameters: expected a mapping of names to values, got {given!r}")
        parameters |= given or {}
    base = whole.get("base_model") or data.get("base_model")
    return {**data, **own, "slices": None, "parameters": parameters, "base_model": base, "num_layers": last}


def _without_unread(data: Mapping[str, Any]) -> Mapping[str, Any]:
    """Leave out parameters of other methods of mergekit, as mergekit does, with a warning."""
    method = data.get("merge_method", "rtsvm")
    if not isinstance(method, str) or method not in METHODS:
        return data
    changed = dict(data)
    if isinstance(data.get("parameters"), Mapping):
        changed["parameters"] = _read(data["parameters"], method, "parameters", per_model=False)
    if isinstance(data.get("models"), list):
        changed["models"] = [
            {**entry, "parameters": _read(entry["parameters"], method, f"model {entry.get('model')}", per_model=True)}
            if isinstance(entry, Mapping) and isinstance(entry.get("parameters"), Mapping)
            else entry
            for entry in data["models"]
        ]
    return changed


def _read(parameters: Mapping[str, Any], method: str, where: str, per_model: bool) -> dict[str, Any]:
    """Return the parameters that a method reads, and those that mergekit does not know either."""
    schema = METHODS[method].parameters
    names = schema.names()
    kept = {}
    for key, value in parameters.items():
        unread = key not in names or (method == "slerp" and key == "weight")
        common = per_model and key in names and not schema.is_per_model(names[key])
        if key not in _MERGEKIT or not (unread or common):
            kept[key] = value
            continue
        why = "it is one value for all models, under `parameters`" if common else f"{method} does not read it"
        seed = "; set `seed`" if key == "random_seed" and "seed" in names else ""
        _LOG.warning("%s", printable(f"{where}: {key} is ignored: {why}{seed}"))
    return kept
