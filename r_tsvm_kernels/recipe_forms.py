"""Rewrite forms of mergekit's recipes that mean the same as the fields of `MergeConfig`.

What mergekit ignores is left out with a note; what nobody knows stays in, and `MergeConfig` refuses it by name.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import Any

from .entries import combined
from .errors import ConfigError
from .methods import METHODS, Unweighted
from .text import printable, shortened, some

_LOG = logging.getLogger(__name__)

# What runs a recipe of mergekit's that is refused here.
MERGEKIT_RUNS_IT = "`rtsvm mergekit yaml RECIPE OUT` runs it with mergekit"
# Parameters of mergekit's methods beside those that ours share. It ignores those that a method does not read.
_MERGEKIT = frozenset((
    "int8_mask", "filter_wise", "random_seed", "max_iter", "tol", "eps", "gamma", "epsilon", "select_topk", "t", "r",
    "nuslerp_flatten", "nuslerp_row_wise", "scale", "lambda", "rescale", "normalize", "density", "weight",
))  # fmt: skip
# Options of mergekit's command line and old recipes, which a recipe's fields do not include.
_OPTIONS = frozenset((
    "allow_crimes", "async_write", "clone_tensors", "copy_tokenizer", "cuda", "device", "gpu_rich", "lazy_unpickle",
    "lora_merge_cache", "lora_merge_dtype", "low_cpu_memory", "multi_gpu", "out_shard_size", "quiet", "random_seed",
    "read_to_gpu", "safe_serialization", "transformers_cache", "trust_remote_code", "write_model_card",
    "write_threads", "residual_weight", "override_architecture", "model_name", "out_path", "output_path",
))  # fmt: skip


def from_mergekit(data: Mapping[str, Any], fields: Collection[str], *, strict: bool = False) -> dict[str, Any]:
    """Return a recipe without what is only mergekit's.

    Args:
        data: the parsed recipe.
        fields: the fields of `MergeConfig`.
        strict: refuse what would be ignored with a note.

    Raises:
        ConfigError: it asks for what is not supported.
    """
    reader = _Reader(data, fields)
    found = _with_models(reader.recipe())
    if strict and reader.notes:
        raise ConfigError(f"strict: {'; '.join(reader.notes)}")
    for note in reader.notes:
        _LOG.warning("%s", printable(note))
    return found


def has_names(value: object) -> bool:
    """Whether a value is a mapping with text as keys."""
    return isinstance(value, Mapping) and all(isinstance(key, str) for key in value)


def is_note(key: str) -> bool:
    """Whether a key of a recipe is ignored: its title, or a place for YAML anchors."""
    return key == "name" or key.startswith("x-")


def reference(value: object, where: str) -> object:
    """Return a model as text: its path, ``path@revision`` or ``model+adapter``.

    Args:
        value: text, or mergekit's mapping ``{model: {path: X, revision: R}, lora: {path: Y}}`` or ``{path: X}``.
        where: for messages.

    Raises:
        ConfigError: another mapping.

    Examples:
        >>> reference({"model": {"path": "org/a", "revision": "v2"}, "lora": {"path": "org/b"}}, "base_model")
        'org/a@v2+org/b'
    """
    if not isinstance(value, Mapping):
        return value
    parts = [value.get("model", value), value.get("lora")]
    if not value.keys() <= {"model", "lora", "override_architecture", "path", "revision"}:
        parts = [None]
    paths = [_path(part) for part in parts if part is not None]
    if not paths or not all(paths):
        raise ConfigError(f"{where}: expected a path, or a mapping `{{model: {{path: X}}}}`, got {shortened(value)}")
    return "+".join(paths)


def _path(value: object) -> str:
    """Return the path and revision of mergekit's ``{path: X, revision: R}``; nothing if it is none."""
    if isinstance(value, str):
        return value
    path, revision = (value.get("path"), value.get("revision")) if isinstance(value, Mapping) else (None, None)
    if not isinstance(path, str) or not isinstance(revision, str | None):
        return ""
    return f"{path}@{revision}" if revision else path


class _Reader:
    """Reads one recipe.

    Attributes:
        notes: what was ignored, and why.
    """

    def __init__(self, data: Mapping[str, Any], fields: Collection[str]) -> None:
        self.data = data
        self.fields = fields
        self.notes: list[str] = []
        name = data.get("merge_method", "rtsvm")
        aliases = {alias: method for method in METHODS.values() for alias in method.aliases}
        self.method = (METHODS | aliases).get(name) if isinstance(name, str) else None
        self.known = {key for method in METHODS.values() for key in method.parameters.names()} | _MERGEKIT

    def recipe(self) -> dict[str, Any]:
        found = {
            key: value for key, value in with_vocabulary(self.data).items() if not is_note(key) and value is not None
        }
        found = self._without_foreign(found, "the recipe", {*self.fields, *self._own()})
        if "base_model" in found:
            found["base_model"] = reference(found["base_model"], "base_model")
        self._read_models(found, "")
        if isinstance(found.get("modules"), Mapping):
            found["modules"] = {name: self._module(str(name), entry) for name, entry in found["modules"].items()}
        return found

    def _own(self) -> Collection[str]:
        return self.method.parameters.names() if self.method else ()

    def _read_models(self, found: dict[str, Any], where: str) -> None:
        """Read parameters, models and slices of a recipe or a module, in place."""
        if isinstance(found.get("parameters"), Mapping):
            found["parameters"] = self._parameters(found["parameters"], f"{where}parameters", per_model=False)
        if isinstance(found.get("models"), list):
            found["models"] = tuple(self._entry(entry, f"{where}models", ()) for entry in found["models"])
        if isinstance(found.get("slices"), list):
            found["slices"] = tuple(self._slice(entry, f"{where}slices") for entry in found["slices"])

    def _module(self, name: str, entry: object) -> object:
        if not has_names(entry):
            raise ConfigError(f"modules: {name}: expected a mapping with `models` or `slices`, got {shortened(entry)}")
        assert isinstance(entry, Mapping)
        where = f"module {name}"
        found = self._without_foreign(entry, where, {"models", "slices", "parameters"})
        self._read_models(found, f"{where}: ")
        return found

    def _slice(self, entry: object, where: str) -> object:
        if not has_names(entry):
            raise ConfigError(f"{where}: expected a mapping with `sources`, got {shortened(entry)}")
        assert isinstance(entry, Mapping)
        found = self._without_foreign(entry, where, {"sources", "base_model", "parameters"})
        sources = found.get("sources")
        if not isinstance(sources, list) or not sources or not all(map(has_names, sources)):
            raise ConfigError(f"{where}: `sources` is a list of `model` and `layer_range`, got {shortened(sources)}")
        found["sources"] = tuple(self._entry(source, where, ("layer_range",)) for source in sources)
        for source in found["sources"]:
            if not isinstance(source.get("layer_range"), list | tuple) or len(source["layer_range"]) != 2:
                raise ConfigError(f"{where}: {source.get('model')} needs layer_range: [first layer, last layer + 1], "
                                  f"got {shortened(source.get('layer_range'))}")  # fmt: skip
        if "base_model" in found:
            found["base_model"] = reference(found["base_model"], f"{where}: base_model")
        if isinstance(found.get("parameters"), Mapping):
            found["parameters"] = self._parameters(found["parameters"], f"{where}: parameters", per_model=False)
        return found

    def _entry(self, entry: Any, where: str, more: tuple[str, ...]) -> Any:
        if not isinstance(entry, Mapping):
            return entry
        if not has_names(entry):
            raise ConfigError(f"{where}: the keys of an entry are `model` and `parameters`, got {shortened(entry)}")
        # `{path: X}` alone is a model, as in mergekit's own form.
        given = {"model": entry} if entry.keys() <= {"path", "revision"} and "path" in entry else entry
        model = reference(given.get("model"), where)
        label = f"{where}: {model}"
        for key in given.keys() & set(self._own()) - {"model"}:
            raise ConfigError(f"{label}: {key} is a parameter; write it under `parameters` of this model")
        found = self._without_foreign(given, label, {"model", "parameters", *more}, elsewhere={"layer_range"})
        if model is not None:
            found["model"] = model
        if isinstance(found.get("parameters"), Mapping):
            found["parameters"] = self._parameters(found["parameters"], label, per_model=True)
        return found

    def _without_foreign(
        self, data: Mapping[str, Any], where: str, kept: Collection[str], elsewhere: Collection[str] = ()
    ) -> dict[str, Any]:
        """Leave out keys without a value, and those that mean something elsewhere alone."""
        found = {}
        for key, value in data.items():
            if value is None:
                continue
            if key in kept or is_note(key):
                found[key] = value
            elif key in _OPTIONS:
                self.notes.append(f"{where}: {key} is ignored: it is no field of a recipe")
            elif key in self.known or key in self.fields or key in elsewhere:
                self.notes.append(f"{where}: {key} is ignored: it has no meaning here")
            else:
                found[key] = value
        return {key: value for key, value in found.items() if key in kept or not is_note(key)}

    def _parameters(self, parameters: Mapping[str, Any], where: str, *, per_model: bool) -> dict[str, Any]:
        """Return the parameters that the method reads, and those that nobody knows."""
        if self.method is None:
            return dict(parameters)
        schema = self.method.parameters
        names = schema.names()
        kept = {}
        for key, value in parameters.items():
            common = per_model and key in names and not schema.is_per_model(names[key]) and key in _MERGEKIT
            weightless = key == "weight" and issubclass(schema, Unweighted)
            if (key in names and not common and not weightless) or not (key in self.known or key in self.fields):
                kept[key] = value
                continue
            why = f"{self.method.name} does not read it"
            if common:
                why = "it is one value for all models, under `parameters`"
            elif key in self.fields and key not in self.known:
                why = "it is a field of the recipe, outside `parameters`"
            seed = "; set `seed`" if key == "random_seed" and "seed" in names else ""
            self.notes.append(f"{where}: {key} is ignored: {why}{seed}")
        return kept


def with_vocabulary(data: Mapping[str, Any]) -> Mapping[str, Any]:
    """Write mergekit's ``tokenizer_source``, and its newer ``tokenizer``, as ``vocabulary`` and fields beside it.

    Raises:
        ConfigError: it asks for more than the vocabulary of the output.
    """
    old, new = data.get("tokenizer_source"), data.get("tokenizer")
    if old is None and new is None:
        return {key: value for key, value in data.items() if key not in ("tokenizer", "tokenizer_source")}
    given = [key for key in ("vocabulary", "tokenizer_source", "tokenizer") if data.get(key) is not None]
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)}: a recipe has one of them")
    beside: dict[str, Any] = {}
    if new is not None:
        if not isinstance(new, Mapping):
            raise ConfigError(f"tokenizer: expected a mapping with `source`, got {shortened(new)}")
        beside = {key: value for key, value in new.items() if key != "source" and value is not None}
        if unknown := beside.keys() - {"tokens", "pad_to_multiple_of"}:
            raise ConfigError(f"tokenizer: unknown key {min(map(str, unknown))!r}; it has source, tokens and "
                              "pad_to_multiple_of")  # fmt: skip
        if twice := beside.keys() & data.keys():
            raise ConfigError(f"{min(twice)} is given twice: under `tokenizer` and beside it")
        if isinstance(tokens := beside.get("tokens"), Mapping):
            beside["tokens"] = {t: own for t, given in tokens.items() if (own := _token_source(t, given)) is not None}
        old = new.get("source") or "union"  # mergekit's default
    old = reference(old, given[0])
    if not isinstance(old, str):
        raise ConfigError(f"{given[0]}: expected base, union or the path of a model, got {shortened(old)}")
    source = old if old in ("base", "union") else f"model:{old.removeprefix('model:')}"
    rest = {key: value for key, value in data.items() if key not in ("tokenizer", "tokenizer_source")}
    return {**rest, **beside, "vocabulary": source}


def _token_source(token: object, given: object) -> object:
    """Write mergekit's source of the rows of a token as the fields of `TokenSource`; None if it has none.

    Raises:
        ConfigError: rows of zeros are asked for, or `force` without a source.
    """
    if not isinstance(given, Mapping) or ("source" not in given and not given.keys() <= {"force"}):
        return given
    source, where = given.get("source"), f"tokenizer: {token}"
    if source is None and given.get("force"):
        raise ConfigError(f"{where}: force needs a source: the model whose row the token gets")
    if source is None:
        return None
    found: dict[str, object] = {key: value for key, value in given.items() if key != "source"}
    if isinstance(source, Mapping) and "kind" in source:
        if source["kind"] != "model_token":
            kind = shortened(source["kind"])
            raise ConfigError(f"{where}: the rows of a token come from a model, not from {kind}; {MERGEKIT_RUNS_IT}")
        chosen = source.get("token_id") if source.get("token") is None else source["token"]
        found |= {} if chosen is None else {"token": chosen}
        source = source.get("model")
    return {**found, "model": reference(source, where)}


def _with_models(found: dict[str, Any]) -> dict[str, Any]:
    """Write one slice of the first layers of all models as ``models`` with so many layers.

    Planning then finds out whether these are whole models.
    """
    given = [key for key in ("models", "slices", "modules") if found.get(key)]
    if len(given) > 1:
        raise ConfigError(f"{some(given)}: a recipe has one of `models`, `slices` and `modules`")
    slices = found.get("slices")
    if not isinstance(slices, tuple) or len(slices) != 1:
        return found
    (whole,) = slices
    sources = whole["sources"]
    ranges = {tuple(source["layer_range"]) for source in sources}
    first, last = ranges.pop() if len(ranges) == 1 else (None, None)
    if first != 0 or type(last) is not int or last < 1 or len(sources) == 1 or whole.keys() - _SLICE_KEYS:
        return found
    models = tuple({key: value for key, value in source.items() if key != "layer_range"} for source in sources)
    rest = {key: value for key, value in found.items() if key != "slices"}
    parameters = combined(whole.get("parameters", {}), found.get("parameters", {}))
    base = {"base_model": whole["base_model"]} if "base_model" in whole else {}
    return {**rest, **base, "models": models, "parameters": parameters, "num_layers": last}


_SLICE_KEYS = frozenset(("sources", "base_model", "parameters"))
