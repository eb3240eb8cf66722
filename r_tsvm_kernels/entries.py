"""The models of a recipe: listed whole, or as sources of slices of layers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from .errors import ConfigError
from .methods import Strict
from .parameters import filter_list
from .text import shortened


def _plain_path(value: object) -> object:
    return str(value) if isinstance(value, Path) else value


PathText = Annotated[str, BeforeValidator(_plain_path)]


class _Shown(Strict):
    """A part of a recipe; its `repr` leaves out defaults."""

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        for name, info in type(self).model_fields.items():
            if getattr(self, name) != info.default:
                yield name, getattr(self, name)


class ModelEntry(_Shown):
    """One model of a recipe.

    Attributes:
        model: Hugging Face folder or id, .safetensors file, folder of a LoRA adapter of the base, or ``model+adapter``;
            None to merge tensors in memory.
        parameters: values of this model for per-model parameters, such as ``weight``.

    Examples:
        >>> ModelEntry(model="org/code", parameters={"weight": 0.5})
        ModelEntry(model='org/code', parameters={'weight': 0.5})
    """

    model: PathText | None = None
    parameters: dict[str, Any] = Field(default={})


class TokenSource(_Shown):
    """Where the rows of a token come from, in a merge that aligns vocabularies.

    Attributes:
        model: one of the models of the recipe.
        token: the token of the model whose rows these are: its text or its id; None is the token itself.
        force: take the rows of the model in any case; otherwise only if the base lacks the token.

    Examples:
        >>> TokenSource(model="org/chat", force=True)
        TokenSource(model='org/chat', force=True)
    """

    model: PathText
    token: str | Annotated[int, Field(ge=0)] | None = None
    force: bool = False


def as_entries(models: Any) -> Any:
    """Accept the path of a model in place of an entry."""
    if not isinstance(models, list | tuple):
        return models
    return tuple({"model": entry} if isinstance(entry, str | Path) else entry for entry in models)


ModelEntries = Annotated[tuple[ModelEntry, ...], BeforeValidator(as_entries)]


class SliceSource(ModelEntry):
    """Some layers of a model.

    Attributes:
        layer_range: the first layer and the one after the last.
        model, parameters: as in `ModelEntry`; a model is required.

    Raises:
        ConfigError: the range holds no layer.

    Examples:
        >>> SliceSource(model="org/code", layer_range=[0, 24])
        SliceSource(model='org/code', layer_range=(0, 24))
    """

    model: PathText
    layer_range: tuple[int, int]

    @property
    def count(self) -> int:
        """Number of layers."""
        return self.layer_range[1] - self.layer_range[0]

    @model_validator(mode="after")
    def _check_range(self) -> SliceSource:
        first, last = self.layer_range
        if not 0 <= first < last:
            raise ValueError(f"layer_range of {self.model}: expected [first, last + 1] of one layer or more, got "
                             f"[{first}, {last}]")  # fmt: skip
        return self


class Slice(_Shown):
    """Successive layers of the output, merged from as many layers of each source.

    Attributes:
        sources: the models and their layers.
        base_model: the base of this slice; None means that of the recipe.
        parameters: parameters of the method for this slice; they take precedence over those of the recipe.

    Raises:
        ConfigError: no sources, or sources with different numbers of layers.

    Examples:
        >>> Slice(sources=[{"model": "a", "layer_range": [0, 8]}, {"model": "b", "layer_range": [4, 12]}]).count
        8
    """

    sources: tuple[SliceSource, ...]
    base_model: PathText | None = None
    parameters: dict[str, Any] = Field(default={})

    @property
    def count(self) -> int:
        """Number of layers."""
        return self.sources[0].count

    @model_validator(mode="after")
    def _check_lengths(self) -> Slice:
        if len({source.count for source in self.sources}) != 1:
            ranges = ", ".join(f"{list(source.layer_range)} of {source.model}" for source in self.sources) or "none"
            raise ValueError(f"expected sources with as many layers each, got {ranges}")
        return self


class ModuleEntry(_Shown):
    """How one module of the models is merged, such as the language model or the image encoder.

    Attributes:
        models: whole models; or
        slices: slices of layers.
        parameters: parameters of the method for this module; they take precedence over those of the recipe.

    Raises:
        ConfigError: neither models nor slices, or both.

    Examples:
        >>> ModuleEntry(models=[{"model": "a"}], parameters={"weight": 0.5})
        ModuleEntry(models=(ModelEntry(model='a'),), parameters={'weight': 0.5})
    """

    models: ModelEntries = ()
    slices: tuple[Slice, ...] = ()
    parameters: dict[str, Any] = Field(default={})

    @model_validator(mode="after")
    def _check_content(self) -> ModuleEntry:
        if bool(self.models) == bool(self.slices):
            raise ValueError("expected either `models` or `slices`")
        return self


def every_entry(
    models: Iterable[ModelEntry], slices: Iterable[Slice], modules: Iterable[ModuleEntry]
) -> tuple[ModelEntry, ...]:
    """Return the models of a recipe, also those of its slices and modules."""
    found = [*models, *(source for part in slices for source in part.sources)]
    for module in modules:
        found += every_entry(module.models, module.slices, ())
    return tuple(found)


def combined(inner: Mapping[str, Any], outer: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters of a part of a recipe, completed with those of the whole.

    An inner list of filters that matches no name leaves the tensor to the outer value.

    Raises:
        ConfigError: not mappings.

    Examples:
        >>> combined({"t": [{"filter": "mlp", "value": 0.2}]}, {"t": 0.5, "seed": 1})
        {'t': [{'filter': 'mlp', 'value': 0.2}, {'value': 0.5}], 'seed': 1}
    """
    for given in (inner, outer):
        if not isinstance(given, Mapping):
            raise ConfigError(f"parameters: expected a mapping of names to values, got {given!r}")
    found = dict(inner)
    for key, value in outer.items():
        own = found.get(key)
        filters = filter_list(own)
        if own is None:
            found[key] = value
        elif filters is not None and value is not None and _has_gaps(filters):
            found[key] = [*filters, *(filter_list(value) or [{"value": value}])]
    return found


def _has_gaps(filters: Sequence[Mapping[str, Any]]) -> bool:
    """Whether some name may match no filter."""
    return all(item.get("filter") not in (None, "*") for item in filters)


def check_filters(value: object, where: str) -> None:
    """Refuse entries of a filter list, nested ones too, other than ``{value, filter}`` with text as filter.

    Raises:
        ConfigError: there is one.
    """
    for item in filter_list(value) or ():
        if not set(item) <= {"value", "filter"} or "value" not in item:
            raise ConfigError(f"{where}: each entry of the list needs `value` and may have `filter`")
        if not isinstance(item.get("filter"), str | None):
            raise ConfigError(
                f"{where}: `filter` is a part of a tensor's name, a text, got {shortened(item['filter'])}"
            )
        check_filters(item["value"], where)
