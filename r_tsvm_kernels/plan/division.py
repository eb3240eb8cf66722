"""Divide a merge into sections: slices of layers, and modules.

An output tensor of a slice is made of tensors with other names in the sources. Each section therefore has views of its
models, which hold the tensors of the section under the names of the output. A section is then planned and merged like
whole models.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from ..checkpoint import Checkpoint, Copy, contradictions, layer_count, layer_rules, settle_copies
from ..config import MergeConfig
from ..entries import ModelEntry, ModuleEntry, Slice, SliceSource, combined
from ..errors import ConfigError, ShapeError
from ..lora.adapted_model import AdaptedModel
from ..missing import without_base
from ..parameters import layer_positions
from ..recipe_forms import MERGEKIT_RUNS_IT
from ..text import some
from .inputs import Inputs, Opener, open_inputs, require_base
from .layer_names import Layers, suffixes
from .module_names import TEXT, tensors_of_modules
from .vocabulary import AlignedVocabulary, align_vocabularies, moved_tokens

Model = Checkpoint | AdaptedModel
Positions = Callable[[Collection[str]], Mapping[str, float]]


@dataclass(frozen=True)
class Section:
    """Tensors of the output that are merged from the same models.

    Attributes:
        inputs: views of the models; the tensors have their names in the output.
        positions: gives the position of each tensor's layer.
    """

    inputs: Inputs
    positions: Positions


@dataclass
class Division:
    """A merge, divided into sections.

    Attributes:
        base: the checkpoint whose configuration, layout and sidecar files the output has.
        models: all models, whole, each once.
        copies: tied tensors that are stored twice.
        vocabulary: of the output, if the recipe asks for one; no rows move.
        sections: the sections, in the order of the output.
        layers: for each layer of the output a model whose configuration describes it, and the layer's index there.
        notes: what deserves attention.
    """

    base: Checkpoint
    models: tuple[Model, ...]
    copies: tuple[Copy, ...]
    vocabulary: AlignedVocabulary | None
    sections: list[Section] = field(default_factory=list)
    layers: tuple[tuple[Checkpoint, int], ...] = ()
    notes: list[str] = field(default_factory=list)
    prefix: str = ""

    def check_layout(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Require the output's tensors to have shapes that the base has for the same tensors, in any layer.

        Raises:
            ShapeError: one has not; the output could not be loaded with the base's configuration.
        """
        known: dict[str, set[tuple[int, ...]]] = {}
        for name, alike in suffixes(self.prefix, self.base.tensors.keys()).items():
            known.setdefault(alike, set()).add(self.base.tensors[name].shape)
        for name, alike in suffixes(self.prefix, shapes.keys()).items():
            if shapes[name] not in known.get(alike, {shapes[name]}):
                expected = " or ".join(map(str, sorted(known[alike])))
                raise ShapeError(
                    f"{name}: has shape {shapes[name]} in its model, {expected} in {self.base.path}, whose "
                    "configuration the output has; set base_model to a model of the same sizes, or leave this one out"
                )
        if new := [name for name, alike in suffixes(self.prefix, shapes.keys()).items() if alike not in known]:
            self.notes.append(f"{self.base.path}, whose configuration the output has, lacks {some(new)}")


def divide(config: MergeConfig, allow_pickle: bool) -> Division:
    """Open the models of a recipe with slices or modules, or of one that copies a model, and divide them.

    Raises:
        ConfigError: no models; a range beyond the layers of a model; a module without tensors; or what is not supported
            for slices.
        CheckpointError, PickleRefusedError, QuantisedRefusedError, AdapterRefusedError: an input cannot be used.
    """
    if not config.every_model or any(entry.model is None for entry in config.every_model):
        raise ConfigError("no models: list at least one under `models`, `slices` or `modules`, each with a `model`")
    if config.requantise:
        raise ConfigError("requantise: slices, modules and copies are written in bfloat16; leave it out")
    if config.num_layers is not None:  # of one slice, which holds a part of the models
        config = _as_slice(config)
    divider = _Divider(config, allow_pickle)
    divider.add_sections()
    return divider.division


def _as_slice(config: MergeConfig) -> MergeConfig:
    layers = (0, int(config.num_layers or 0))
    sources = tuple(SliceSource(layer_range=layers, **entry.model_dump()) for entry in config.models)
    return config.model_copy(update={"models": (), "num_layers": None, "slices": (Slice(sources=sources),)})


class _Divider:
    """Opens the models of one recipe, and adds its sections to a `Division`."""

    def __init__(self, config: MergeConfig, allow_pickle: bool) -> None:
        self.config = config
        self.opener = Opener(config, allow_pickle)
        slices = (*config.slices, *(own for module in config.modules.values() for own in module.slices))
        bases = [part.base_model for part in slices if part.base_model is not None]
        names = [] if config.base_model is None else [config.base_model]
        names += [*config.model_names, *bases]
        self.opened = {name: self.opener.model(*self.opener.paths(name)) for name in names}
        base = _checkpoint(next(iter(self.opened.values())))
        checkpoints = list(dict.fromkeys(map(_checkpoint, self.opened.values())))
        copies = settle_copies(base, checkpoints[1:])
        dropped = {(copy.checkpoint, copy.name) for copy in copies if copy.dropped}
        self.tensors = {x: [name for name in x.tensors if (x, name) not in dropped] for x in checkpoints}
        self.division = Division(base, tuple(self.opened.values()), copies, self._vocabulary(base, checkpoints))
        self.division.notes += [note for checkpoint in checkpoints for note in checkpoint.notes]
        for checkpoint in checkpoints[1:]:
            if found := [x for x in contradictions(base.config, checkpoint.config) if not x.startswith("layer_types")]:
                self.division.notes.append(f"{checkpoint.path}: its config has {'; '.join(found)} in {base.path}")
            if self.config.vocabulary is None and (note := moved_tokens(base, checkpoint)):
                self.division.notes.append(note)

    def _vocabulary(self, base: Checkpoint, checkpoints: Sequence[Checkpoint]) -> AlignedVocabulary | None:
        """Return the vocabulary of the output, if the tokens of all models have the same rows."""
        if self.config.vocabulary is None:
            return None
        models = tuple(ModelEntry(model=name) for name in self.opened)
        whole = self.config.model_copy(update={"models": models, "slices": (), "modules": {}})
        found = align_vocabularies(whole, base, tuple(self.opened.values()), checkpoints)
        if found.names:
            raise ConfigError(
                f"vocabulary: the tokenizers of the models differ, and the rows of slices and modules are not aligned; "
                f"{MERGEKIT_RUNS_IT}, or give each model the vocabulary of the output first"
            )
        return found

    def add_sections(self) -> None:
        config = self.config
        if not config.modules:
            everything = dict(self.tensors)
            part = ModuleEntry.model_construct(models=config.models, slices=config.slices, parameters={})
            self._add_module(part, everything)
            return
        by_module: dict[str, dict[Checkpoint, list[str]]] = {}
        for checkpoint, names in self.tensors.items():
            for module, own in tensors_of_modules(config.modules, names).items():
                by_module.setdefault(module, {})[checkpoint] = own
        for module, part in config.modules.items():
            self._add_module(part, by_module[module], module)
        base = self.division.base
        if rest := by_module.get("", {}).get(base):
            self.division.notes.append(f"{some(rest)}: of no module of the recipe; copied from {base.path}")
            self._add_copies(base, {name: name for name in rest}, lambda names: dict.fromkeys(names, 0.0))

    def _add_module(self, part: ModuleEntry, tensors: Mapping[Checkpoint, list[str]], module: str = "") -> None:
        parameters = combined(part.parameters, self.config.parameters)
        if part.slices:
            self._add_slices(part.slices, parameters, tensors, module)
        else:
            self._add_whole(part.models, parameters, tensors)

    # --- whole models

    def _add_whole(
        self, models: tuple[ModelEntry, ...], parameters: dict[str, object], tensors: Mapping[Checkpoint, list[str]]
    ) -> None:
        sub = self.config.model_copy(
            update={"models": models, "parameters": parameters, "slices": (), "modules": {}, "vocabulary": None}
        )
        opened = open_inputs(sub, opener=self.opener)
        views = {x: x.view({name: name for name in own}) for x, own in tensors.items()}
        tuned = tuple(
            model.view(views[model.base], {name: name for name in tensors[model.base]})
            if isinstance(model, AdaptedModel)
            else views[model]
            for model in opened.tuned
        )
        base = views[opened.base]
        if sub.method.copies is not None:
            if len(tuned) != 1:
                raise ConfigError(sub.method.wrong_number(len(tuned)))
            base = _checkpoint(tuned[0])
        layers, further = layer_count(opened.base.config) or (0, 0)
        positions = lambda names: layer_positions(names, layers, further)  # noqa: E731
        self.division.sections.append(Section(Inputs(base, tuned, opened.config), positions))

    def _add_copies(self, checkpoint: Checkpoint, names: Mapping[str, str], positions: Positions) -> None:
        view = checkpoint.view(names)
        config = self.config.model_copy(
            update={
                "merge_method": "passthrough", "parameters": {}, "slices": (), "modules": {}, "vocabulary": None,
                "models": (ModelEntry(model=str(checkpoint.path)),),
            }
        )  # fmt: skip
        self.division.sections.append(Section(Inputs(view, (view,), config), positions))

    # --- slices

    def _add_slices(
        self,
        slices: tuple[Slice, ...],
        parameters: dict[str, object],
        tensors: Mapping[Checkpoint, list[str]],
        module: str,
    ) -> None:
        reference = self.division.base
        layers = Layers.find(reference, tensors.get(reference, []))
        counts = {
            checkpoint: layers.count(checkpoint, tensors.get(checkpoint, []))
            for checkpoint in dict.fromkeys(_checkpoint(model) for model in self._used(slices))
        }
        total = sum(part.count for part in slices)
        if module and module not in TEXT and total != layers.count(reference, tensors[reference]):
            raise ConfigError(
                f"modules: {module} would have {total} layers, {reference.path} has "
                f"{layers.count(reference, tensors[reference])}; only the language model's number can change; "
                f"{MERGEKIT_RUNS_IT}"
            )
        first = 0
        described: list[tuple[Checkpoint, int]] = []
        for index, part in enumerate(slices):
            edges = (["before"] if index == 0 else []) + (["after", "further"] if index == len(slices) - 1 else [])
            place = _Place(layers, counts, tensors, first, part.count, total, edges)
            origin = self._add_slice(part, combined(part.parameters, parameters), place)
            described += [(origin[0], origin[1] + offset) for offset in range(part.count)]
            first += part.count
        self.division.prefix = self.division.prefix or layers.prefix
        if module and module not in TEXT:
            return
        base, count = self.division.base, layers.count(reference, tensors[reference])
        self.division.prefix = layers.prefix
        if described != [(base, index) for index in range(count)]:
            self.division.layers = tuple(described)
            if rules := layer_rules(base.config):
                self.division.notes.append(
                    f"{base.path}: its config decides by a layer's index what kind it is ({', '.join(rules)}); the "
                    "layers of the output have other indexes: check that each kind stays where the config expects it"
                )

    def _used(self, slices: Sequence[Slice]) -> Iterator[Model]:
        for part in slices:
            base = part.base_model or self.config.base_model
            names = [str(source.model) for source in part.sources] + ([base] if base else [])
            yield from (self.opened[name] for name in names)

    def _add_slice(self, part: Slice, parameters: dict[str, object], place: _Place) -> tuple[Checkpoint, int]:
        """Add a section; return the model whose configuration describes its layers, and the first of them there."""
        config, method = self.config, self.config.method
        require_base(config, part.base_model)
        base_name = part.base_model or config.base_model
        base = None if base_name is None else self.opened[base_name]
        sources = [(source, self.opened[str(source.model)], source.layer_range) for source in part.sources]
        for source, model, (_, last) in sources:
            if last > place.counts[_checkpoint(model)]:
                raise ConfigError(
                    f"slices: layers {list(source.layer_range)} of {source.model}, which has "
                    f"{place.counts[_checkpoint(model)]}"
                )
        listed = next((i for i, (_, model, _) in enumerate(sources) if model is base), None)
        only = sources[0][1]
        alone = len(sources) == 1 and (method.tasks is not None or listed == 0)
        if alone and isinstance(only, Checkpoint) and method.copies is None:  # there is nothing to merge it with
            self._add_copies(only, place.names(only, sources[0][2][0]), place.positions)
            return only, sources[0][2][0]
        views: dict[tuple[Checkpoint, int], Checkpoint] = {}

        def view(model: Model, start: int) -> Model:
            checkpoint = _checkpoint(model)
            names = place.names(checkpoint, start)
            seen = views.setdefault((checkpoint, start), checkpoint.view(names))
            return model.view(seen, names) if isinstance(model, AdaptedModel) else seen

        forms_vectors = method.forms_vectors(base is not None)
        if forms_vectors and listed is None and len({span for *_, span in sources}) > 1:
            raise ConfigError(f"slices: {base_name} is the base of sources of other layers; list its layers, too")
        origin = base if base is not None and (forms_vectors or listed is not None) else only
        start = sources[listed or 0][2][0]
        owner = _checkpoint(view(origin, start))
        if forms_vectors:  # other layers of the base are a model
            sources = [own for own in sources if own[1] is not base or own[2][0] != start]
            if not sources:
                raise ConfigError(f"slices: only the base, {base_name}, is a source of a slice; add another model")
        entries = tuple(ModelEntry(model=source.model, parameters=source.parameters) for source, *_ in sources)
        sub = config.model_copy(
            update={
                "models": entries, "parameters": parameters, "slices": (), "modules": {}, "vocabulary": None,
                "base_model": base_name, "num_layers": part.count,
            }
        )  # fmt: skip
        sub = without_base(sub) if base is None else sub
        if method.tasks not in (None, len(entries)):
            raise ConfigError(f"slices: {method.wrong_number(len(entries))}")
        tuned = tuple(view(model, span[0]) for _, model, span in sources)
        self.division.sections.append(Section(Inputs(owner, tuned, sub), place.positions))
        return _checkpoint(origin), start


@dataclass(frozen=True)
class _Place:
    """The place of a slice in the output.

    Attributes:
        layers: where layers are in the names of tensors.
        counts: number of layers of each model.
        tensors: names of the tensors of each model.
        first: the first layer of the slice in the output.
        count: number of layers.
        total: number of layers of the output.
        edges: which tensors outside the layers it has: ``before``, ``after``, ``further``.
    """

    layers: Layers
    counts: Mapping[Checkpoint, int]
    tensors: Mapping[Checkpoint, list[str]]
    first: int
    count: int
    total: int
    edges: Collection[str]

    def names(self, checkpoint: Checkpoint, start: int) -> dict[str, str]:
        """Map the names in the output to those of a model whose layers begin at `start`."""
        found = {}
        for name in self.tensors[checkpoint]:
            kind, index = self.layers.place(name, self.counts[checkpoint])
            if kind == "layer" and start <= index < start + self.count:
                found[self.layers.renamed(name, self.first + index - start)] = name
            elif kind == "further" and kind in self.edges:
                found[self.layers.renamed(name, self.total + index)] = name
            elif kind in self.edges and kind != "further":
                found[name] = name
        return found

    def positions(self, names: Collection[str]) -> dict[str, float]:
        """Return the position of each tensor's layer in the slice, from 0 to 1; outside of it 0, as in mergekit."""
        found = {}
        for name in names:
            kind, index = self.layers.place(name, self.total)
            inside = (index - self.first) / (self.count - 1) if self.count > 1 else 1.0
            found[name] = inside if kind == "layer" else float(kind == "further")
        return found


def _checkpoint(model: Model) -> Checkpoint:
    return model.base if isinstance(model, AdaptedModel) else model
