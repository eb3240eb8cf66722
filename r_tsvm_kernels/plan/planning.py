"""Make the plan of a merge: open the inputs, check that they match, choose the treatment of each tensor."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import reduce

import torch

from ..checkpoint import (
    Checkpoint,
    ScaledHeader,
    TensorSpec,
    contradictions,
    layer_count,
    plan_shards,
    settle_copies,
    shard_name,
    shared_seeds,
)
from ..config import MergeConfig
from ..errors import CheckpointError, ConfigError, QuantisedRefusedError
from ..lora import Adapter
from ..lora.adapted_model import AdaptedModel
from ..lora.task_part import TaskPart
from ..methods import Method, MethodParameters
from ..ops._checks import FLOAT_DTYPES
from ..parameters import count_layers, layer_positions
from ..text import some
from ..treatments import Treatment, stored_dtype, treatment
from ..values import check_options
from .decomposition import Decomposition, decomposed
from .division import divide
from .inputs import Inputs, open_inputs, sources
from .merge_plan import MergePlan, Part, TensorPlan
from .presence import compare_tensors
from .vocabulary import AlignedVocabulary, align_vocabularies, aligned_tensors, moved_tokens


def make_plan(
    config: MergeConfig,
    shard_bytes: int,
    stem: str | None = None,
    *,
    allow_pickle: bool = False,
    decomposition: Decomposition | None = None,
) -> MergePlan:
    """Open the inputs, check that they match, and choose the treatment of each tensor.

    Args:
        config: a recipe with models.
        shard_bytes: size limit of output shards.
        stem: stem of the output files' names; None means that of the base.
        allow_pickle: read models that exist only as pickle.
        decomposition: write the parts of the merge instead of the merged tensors.

    Returns:
        The plan; no values are read except to recognise tied tensors.

    Raises:
        ConfigError: no models, or no base although the method needs one; a single output file for several modules; a
            pattern that matches no tensor; a weight that does not fit the dtype of the merge; or vocabularies that
            cannot be aligned.
        CheckpointError, PickleRefusedError: an input is missing or damaged, or has other tensors than the base.
        QuantisedRefusedError: an input is quantised.
        ShapeError: shapes differ.
        DTypeError: a tensor cannot be merged.
    """
    plan = None if config.is_divided else _plan_whole(config, allow_pickle)
    if plan is None and (decomposition is not None or config.parts is not None):
        raise ConfigError("parts: slices and modules have none; decompose a recipe of whole models")
    if plan is None:
        plan = _plan_divided(config, allow_pickle)
    if decomposition is None:
        plan.shards.update(_shards(plan.base, plan.specs, shard_bytes, stem))
    else:
        plan = decomposed(plan, decomposition)
    for name, tensor in plan.tensors.items():
        if tensor.treatment.kind != "base":
            check_options(tensor.options, plan.accumulation(tensor), name)
        if tensor.treatment.kind == "merge":
            _check_weights(plan.section(name).config.method, tensor.options, name)
    return plan


def _check_weights(method: Method, options: MethodParameters, name: str) -> None:
    if method.elects:
        return
    try:
        options.check_weights()
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None


def _plan_whole(config: MergeConfig, allow_pickle: bool) -> MergePlan | None:
    """Plan the merge of whole models; None if the recipe's only slice turns out to be a part of them."""
    opened = open_inputs(config, allow_pickle)
    base, tuned, config, parts = opened.base, opened.tuned, opened.config, opened.parts
    checkpoints = [source for source in sources(base, tuned) if isinstance(source, Checkpoint)]
    layers, further = layer_count(base.config) or (count_layers(base.tensors), 0)
    if config.num_layers not in (None, layers, count_layers(base.tensors)):
        return None
    if parts is None:
        config.check_patterns({name for checkpoint in checkpoints for name in checkpoint.tensors})
    moves = config.vocabulary is not None and parts is None
    vocabulary = None if not moves else align_vocabularies(config, base, tuned, checkpoints)
    copies = settle_copies(base, checkpoints[1:])
    dropped = {(copy.checkpoint, copy.name) for copy in copies if copy.dropped}
    plan = _plan_models(opened, dropped, vocabulary, lambda names: layer_positions(names, layers, further))
    notes = [note for checkpoint in checkpoints for note in checkpoint.notes] + list(plan.notes)
    for checkpoint in checkpoints[1:]:
        if found := contradictions(base.config, checkpoint.config):
            notes.append(f"{checkpoint.path}: its config has {'; '.join(found)} in the base; is it a fine-tune of it?")
        if vocabulary is None and (note := moved_tokens(base, checkpoint)):
            notes.append(note)
    return replace(plan, copies=copies, notes=tuple(notes))


def _plan_divided(config: MergeConfig, allow_pickle: bool) -> MergePlan:
    """Plan a merge of slices or modules: one plan for each, joined."""
    division = divide(config, allow_pickle)
    base = division.base
    plans = [_plan_models(section.inputs, (), None, section.positions) for section in division.sections]
    tensors = {name: tensor for plan in plans for name, tensor in plan.tensors.items()}
    config.check_patterns(tensors)
    division.check_layout({name: tensor.spec.shape for name, tensor in tensors.items()})
    notes = dict.fromkeys((*division.notes, *(note for plan in plans for note in plan.notes)))
    beside = {path: names for plan in plans for path, names in plan.beside.items()}
    return MergePlan(
        base,
        division.models,
        config,
        tensors,
        {},
        division.copies,
        beside,
        tuple(notes),
        division.vocabulary,
        sections={name: plan for plan in plans for name in plan.tensors},
        layers=division.layers,
    )


def _plan_models(
    opened: Inputs,
    dropped: Collection[tuple[Checkpoint, str]],
    vocabulary: AlignedVocabulary | None,
    positions_of: Callable[[Collection[str]], Mapping[str, float]],
) -> MergePlan:
    """Plan the merge of tensors that have the same names in all models.

    Args:
        opened: the models.
        dropped: copies of tied tensors, which are left out.
        vocabulary: of the output.
        positions_of: gives the position of each tensor's layer.
    """
    base, tuned, config, parts = opened.base, opened.tuned, opened.config, opened.parts
    inputs = sources(base, tuned)
    checkpoints = [source for source in inputs if isinstance(source, Checkpoint)]
    models = {model.base if isinstance(model, AdaptedModel) else model for model in tuned}
    adapted = [model for model in tuned if isinstance(model, AdaptedModel)]
    aligned = aligned_tensors(vocabulary, config, base, adapted)
    presence = compare_tensors(base, checkpoints[1:], models, dropped, config, aligned)
    names = presence.headers
    if parts is not None:  # without the copies that the fine-tunes did not have
        names = {name: header for name, header in names.items() if name in parts.tensors}
    layouts = _fp8_layouts(base, config)
    names |= base.activation_scales if config.requantise else {}
    for model in adapted:
        if changed := [name for name in model.modules if (model.base, name) in dropped]:
            raise CheckpointError(f"{model.path}: changes {changed[0]}, which the base ties to the embedding")
    seeds = shared_seeds(base, checkpoints[1:]) if "seed" in config.method.parameters.model_fields else {}

    positions = positions_of(names)
    specs, treatments, options, blocks = {}, {}, {}, {}
    shapes = {name: header.shape for name, header in names.items()}
    splits = config.splits(shapes, base.config)
    for name, header in names.items():
        shape = header.shape if vocabulary is None or name not in aligned else (vocabulary.height, *header.shape[1:])
        options[name] = config.options(len(tuned), name, positions[name], seeded_by=seeds.get(name))
        divided = config.blocks(name, shape, shapes.get, splits)
        decided = treatment(config, options[name], name, shape, header.dtype, len(tuned), divided)
        decided = presence.treatment(name, decided)
        if name in base.activation_scales:
            decided = Treatment("base", "scale of activations")
        if decided.kind != "base":
            for checkpoint in checkpoints:
                if name in checkpoint.tensors and checkpoint.tensors[name].dtype not in FLOAT_DTYPES:
                    raise QuantisedRefusedError(
                        f"{checkpoint.path}: {name} is {checkpoint.tensors[name].dtype}, where the base has "
                        f"{header.dtype}; if the model is quantised, dequantise it and merge that; if the tensor is a "
                        "mask or another buffer, exclude it"
                    )
            unchanged = all(model.base is base and name not in model.modules for model in adapted)
            relative = config.method.forms_vectors(getattr(options[name], "relative", False))
            if relative and len(adapted) == len(tuned) and unchanged:
                decided = Treatment("base", "no adapter changes it")
            elif unchanged and config.copies_values(options[name]):
                decided = Treatment("base", f"copied from {base.path}")
        if name in aligned and vocabulary is not None and (decided.kind == "base" or decided.present_only):
            if decided.present_only or vocabulary.moves_base(base):
                raise ConfigError(
                    f"vocabulary: the rows of {name} cannot be aligned: {decided.reason}; use --vocabulary base and "
                    "--missing base, which keep those of the base"
                )
            aligned -= {name}
        treatments[name], blocks[name] = decided, divided
        specs[name] = TensorSpec(stored_dtype(config, header.written_as), shape)
        if name in layouts and name not in aligned:
            specs[name] = TensorSpec(layouts[name].weight.dtype, header.shape)
        elif name in base.activation_scales:
            specs[name] = TensorSpec(header.dtype, header.shape)
    tensors = {
        name: TensorPlan(
            name,
            treatments[name],
            specs[name],
            positions[name],
            _parts(name, treatments[name], inputs, adapted, name in aligned),
            options[name],
            seeds.get(name),
            blocks[name],
            None if name in aligned else layouts.get(name),
            name in aligned,
        )
        for name in names
    }
    notes = presence.notes()
    notes += vocabulary.notes if vocabulary is not None else ()
    if moved := sorted(aligned & layouts.keys()):
        notes.append(
            f"requantise: the vocabulary moves the rows of {some(moved)}, so they are not written in FP8; name them in "
            "modules_to_not_convert of quantization_config"
        )
    return MergePlan(base, tuned, config, tensors, {}, (), presence.beside, tuple(notes), vocabulary, parts)


def _fp8_layouts(base: Checkpoint, config: MergeConfig) -> dict[str, ScaledHeader]:
    """Return the weights of the base that are written in FP8.

    Raises:
        ConfigError: the recipe asks for it, but the base has none, or has MXFP4.
    """
    if not config.requantise:
        return {}
    scaled = {name: header for name, header in base.tensors.items() if isinstance(header, ScaledHeader)}
    if not scaled:
        raise ConfigError(f"requantise: {base.path} has no weights in FP8 with scales; leave it out")
    if other := [name for name, header in scaled.items() if not header.is_fp8]:
        raise ConfigError(f"requantise: {other[0]} of {base.path} is MXFP4, and only FP8 can be written; leave it out")
    base.show_activation_scales()
    return scaled


def _shards(base: Checkpoint, specs: dict[str, TensorSpec], shard_bytes: int, stem: str | None) -> dict[str, list[str]]:
    """Distribute the tensors of each module over files in its folder. Loaders read the index of a main module only."""
    if stem is not None and any(module.prefix for module in base.modules):
        folders = ", ".join(module.folder or "." for module in base.modules)
        raise ConfigError(f"{base.path} has modules of its own in folders ({folders}); choose a folder as the output")
    shards = {}
    for module in base.modules:
        own = {name: spec for name, spec in specs.items() if base.module(name) is module}
        # In sentence-transformers only transformers, which have a config, are loaded by an index.
        divided = not module.prefix and (len(base.folders) == 1 or base.config)
        layout = plan_shards(own, shard_bytes if divided else 2**63)
        folder = "" if stem is not None or not module.folder else f"{module.folder}/"
        for index, names in enumerate(layout):
            shards[folder + shard_name(stem or module.weights.stem, index, len(layout))] = names
    return shards


def _parts(
    name: str,
    decided: Treatment,
    inputs: Sequence[Checkpoint | Adapter],
    adapted: Sequence[AdaptedModel],
    aligned: bool,
) -> tuple[Part, ...]:
    """Return the parts of a tensor to read; only that of the base if its value stays.

    Aligned tensors are read in one dtype, because a model's rows may be completed with those of others.
    """
    modules = {model.adapter: model.modules for model in adapted}
    found = []
    for index, source in enumerate(inputs[:1] if decided.kind == "base" else inputs):
        if isinstance(source, Checkpoint):
            if header := source.tensors.get(name):
                stored = sum(tensor.nbytes for tensor in header.stored)
                found.append(Part(index, header.dtype, file_bytes=None if header.stored == (header,) else stored))
        elif isinstance(source, TaskPart) and name in source.kinds:
            first, *others = source.headers(name)  # of the left factor and the right one, or of the dense part
            size = first.nbytes + sum(header.nbytes for header in others)
            factors = Part(index, first.dtype, first.shape[-1], size) if others else None
            found.append(factors or Part(index, first.dtype))
        elif name in modules[source]:
            key = modules[source][name]
            first, *others = source.headers(key)
            dtype, product = first.dtype, source.is_product(key)
            for header in others:
                dtype = torch.promote_types(dtype, header.dtype)
            size = first.nbytes + sum(header.nbytes for header in others)
            found.append(Part(index, dtype, first.shape[0] if product else 0, size, whole=not product))
    if aligned:
        widest = reduce(torch.promote_types, (part.dtype for part in found if part.rank is None))
        found = [part if part.rank is not None else replace(part, dtype=widest) for part in found]
    return tuple(found)
