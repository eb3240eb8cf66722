"""MergeConfig: what to merge and how. Its YAML form is mergekit's recipe format, where the two overlap."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, Field, model_validator

from .blocks import WHOLE, Blocks, Shape, blocks_of
from .entries import ModelEntries, ModuleEntry, PathText, Slice, TokenSource, as_entries, check_filters, every_entry
from .entries import ModelEntry as ModelEntry  # part of the public interface
from .errors import ConfigError
from .experts import is_router
from .fused import require_splits
from .methods import METHODS, Method, MethodParameters, Strict, did_you_mean, get_method, nearest
from .ops._checks import plain_values
from .parameters import evaluate, filter_list, leaves
from .recipe_fields import DTYPES as DTYPES
from .recipe_fields import Calibration, ConvChoice, DTypeName, Missing, RouterChoice, Sizes, vocabulary_choice
from .recipe_fields import as_dtype as as_dtype
from .recipe_forms import from_mergekit, has_names
from .steps import arranged, read_documents


class MergeConfig(Strict):
    """A merge: the method, its parameters, and for checkpoints also the models.

    Parameters of the method are keywords: ``MergeConfig("ties", weight=[1.0, 0.5], density=0.2)``. A number applies to
    all models; a list holds one value per model, if the parameter is one that models may set for themselves. In a
    recipe, and under `parameters`, a value may also be a gradient (list of numbers, interpolated over the layers) or a
    list of ``{value, filter}``: the first entry whose filter is a substring of the tensor's name applies. Precedence:
    the model's own value, the common value, the method's default.

    Args:
        merge_method: name of a registered method; the only positional argument.
        data: the attributes below, and parameters of the method.

    Attributes:
        merge_method: name of the method.
        base_model: Hugging Face folder or id, or .safetensors file. Methods that form no task vectors (`linear`,
            `karcher`) merge it as one more model if `models` does not list it, as mergekit does: see `base_joins`.
        models: the fine-tuned models, as paths or with parameters of their own.
        parameters: parameters of the method, common to all models.
        dtype: dtype that inputs are rounded to when they are loaded, mergekit's key. Arithmetic is in float32, or in
            float64 for float64 inputs.
        out_dtype: dtype of the output; None keeps `dtype`, or else the dtype of each tensor of the base. Both take a
            `torch.dtype` or its name.
        include: patterns (with ``*``) of the tensor names to merge; empty means all.
        exclude: patterns of the tensor names that keep the base's value.
        router: what happens to the routers of mixtures of experts: ``merge`` (as any other tensor), ``base`` (the
            base's value) or ``mean`` (of the task vectors).
        missing: what becomes of tensors that only some models have. ``error`` refuses the merge. ``base`` gives the
            output the base's value, and no tensor that the base lacks. ``mean_of_present`` gives it the mean of the
            models that have the tensor.
        conv: what spectral methods do with the weight of a convolution, (out, in, k, ...): ``mean`` (of the task
            vectors) or ``flatten`` (merge the matrix (out, in * k * ...)).
        calibrate: ``svc`` calibrates the singular values of the merged change of each matrix, whatever the method: see
            docs/methods.md. None calibrates nothing.
        calibrate_floor: least response of a task that the calibration counts.
        split: sizes of the matrices in fused tensors, by patterns of names, as ``{"*qkv_proj*": [4096, 1024, 1024]}``,
            each merged as a tensor of its own; or ``auto``, for those of known models: see `known_splits`.
        requantise: write the weights that the base has in FP8 in its layout, with new scales, instead of bfloat16.
        slices: slices of layers, in place of `models`; the layers of the output are theirs, in order.
        modules: models or slices by module (``text_decoder``, ...), in place of `models`; see docs/merging.md.
        chat_template: of the output's tokenizer: ``auto`` (that of most models), ``chatml``, ``llama3``, ``alpaca``, or
            the text of a Jinja template. None keeps that of the base.
        num_layers: number of layers of every model, from a recipe's only slice; other models count as sliced.
        steps: merges that come before this one, by name, in order; models may refer to their outputs by these names.
        places: paths of these outputs, by name; set by a running merge.
        parts: folder that `decompose_checkpoints` wrote for this recipe, with any weights and alpha: the merge reads it
            instead of the models.
        parts_rank: largest rank of the parts that are read, as factors; None reads all of them.
        vocabulary: the tokens of the output: ``base``, ``union`` (the base's, then those that only models have), or
            ``model:PATH``, those of one model. Rows of embeddings and heads are aligned by their tokens. None does not
            look at tokenizers: all models must have as many rows.
        tokens: rows of single tokens, by their texts, that come from one model; see `TokenSource`. A token that the
            vocabulary lacks is added to it.
        pad_to_multiple_of: the output has a number of rows that this divides.

    Raises:
        ConfigError: an unknown keyword, method or parameter (the message names the nearest), or a value out of range.

    Examples:
        >>> MergeConfig("ties", weight=[1.0, 0.5], density=0.2)
        MergeConfig('ties', weight=[1.0, 0.5], density=0.2)
        >>> MergeConfig("rtsvm", base_model="org/base", models=["org/math", "org/code"], out_dtype="bfloat16")
        MergeConfig('rtsvm', base_model='org/base', models=['org/math', 'org/code'], out_dtype='bfloat16')
    """

    merge_method: str = "rtsvm"
    base_model: PathText | None = None
    models: ModelEntries = ()
    parameters: dict[str, Any] = Field(default={})
    dtype: DTypeName | None = None
    out_dtype: DTypeName | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    router: RouterChoice = "merge"
    missing: Missing = "error"
    conv: ConvChoice = "mean"
    calibrate: Calibration | None = None
    calibrate_floor: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.1
    split: Literal["auto"] | dict[str, Sizes] = Field(default={})
    requantise: bool = False
    slices: tuple[Slice, ...] = ()
    modules: dict[str, ModuleEntry] = Field(default={})
    chat_template: str | None = None
    num_layers: int | None = None
    steps: dict[str, MergeConfig] = Field(default={})
    places: dict[str, str] = Field(default={})
    parts: PathText | None = None
    parts_rank: Annotated[int, Field(ge=1)] | None = None
    vocabulary: Annotated[str, AfterValidator(vocabulary_choice)] | None = None
    tokens: dict[str, TokenSource] = Field(default={})
    pad_to_multiple_of: Annotated[int, Field(ge=1)] | None = None

    def __init__(self, merge_method: str | None = None, /, **data: Any) -> None:
        if merge_method is not None:
            if "merge_method" in data:
                raise ConfigError(f"two methods: {merge_method!r} and merge_method={data['merge_method']!r}")
            data["merge_method"] = merge_method
        super().__init__(**_sorted_keywords(data))

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        """Yield what differs from the defaults, as keywords that give the same config."""
        yield None, self.merge_method
        for name, info in type(self).model_fields.items():
            value = getattr(self, name)
            if name == "merge_method" or value == info.default:
                continue
            if name == "parameters":
                schema = self.method.parameters
                recipe = {k: v for k, v in value.items() if k == "lambda" or _is_one_per_model(schema, k, v)}
                yield from ((key, item) for key, item in value.items() if key not in recipe)
                if recipe:
                    yield name, recipe
            elif name != "models":
                yield name, value
            elif all(entry.model is None and entry.parameters.keys() == value[0].parameters.keys() for entry in value):
                yield from ((key, [entry.parameters[key] for entry in value]) for key in value[0].parameters)
            else:
                yield name, [entry if entry.parameters else entry.model for entry in value]

    def __str__(self) -> str:
        return repr(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, strict: bool = False) -> MergeConfig:
        """Make a config from a parsed recipe; ``name`` and keys such as ``x-notes`` are ignored.

        Args:
            data: the recipe.
            strict: refuse keys that have no meaning where they are, instead of ignoring them with a warning.

        Raises:
            ConfigError: not a valid recipe.

        Examples:
            >>> MergeConfig.from_dict({"merge_method": "ties", "parameters": {"density": [0.1, 0.3]}})
            MergeConfig('ties', parameters={'density': [0.1, 0.3]})
        """
        if not has_names(data):
            raise ConfigError(f"a recipe is a mapping, got {type(data).__name__ if data else 'nothing'}")
        present = from_mergekit(data, cls.model_fields, strict=strict)
        for key in present.keys() - cls.model_fields.keys():
            raise ConfigError(_unknown_key(key, present.get("merge_method", "rtsvm"), under="under `parameters`"))
        return cls(**present)

    @classmethod
    def from_documents(cls, documents: Sequence[Mapping[str, Any]], *, strict: bool = False) -> MergeConfig:
        """Make a config from several parsed recipes. Those with a ``name`` that others use become its `steps`.

        Raises:
            ConfigError: not valid recipes; two of one name; no recipe, or several, of the output; or a circle.

        Examples:
            >>> first = {"name": "first", "merge_method": "linear", "models": ["a", "b"]}
            >>> last = {"merge_method": "slerp", "base_model": "a", "models": ["first"]}
            >>> list(MergeConfig.from_documents([first, last]).steps)
            ['first']
        """
        last, steps = arranged(documents, lambda data: cls.from_dict(data, strict=strict))
        return last.model_copy(update={"steps": steps}) if steps else last

    @classmethod
    def from_yaml(cls, path: str | Path, *, strict: bool = False) -> MergeConfig:
        """Read a recipe file in mergekit's format; docs/mergekit.md lists the differences.

        Args:
            path: of the file.
            strict: see `from_dict`.

        Raises:
            ConfigError: the file is missing, is not YAML, or is not a valid recipe.
        """
        return cls.from_documents(read_documents(path), strict=strict)

    def to_yaml(self) -> str:
        """Write the config as a recipe that `from_yaml` reads back."""
        data = self.model_dump(mode="json", exclude_defaults=True, exclude={"steps", "places"})
        last = yaml.safe_dump({"merge_method": self.merge_method, **data}, sort_keys=False)
        steps = (yaml.safe_dump({"name": name}) + step.to_yaml() + "---\n" for name, step in self.steps.items())
        return "".join([*steps, last])

    @property
    def method(self) -> Method:
        """The registered method."""
        return get_method(self.merge_method)

    @property
    def row_wise(self) -> bool:
        """Whether rows may be merged separately: see `Method`. A calibration needs whole matrices."""
        return self.method.row_wise and self.calibrate is None

    @property
    def base_joins(self) -> bool:
        """Whether the base is merged as one more model although `models` does not list it.

        True, as in mergekit, if the method forms no task vectors and the recipe has `models`; a slice lists all its
        sources.
        """
        listed = [entry.model for entry in self.models]
        unlisted = self.base_model is not None and bool(listed) and self.base_model not in listed
        return (
            unlisted and self.num_layers is None and not self.method.forms_vectors(True) and self.method.tasks is None
        )

    def with_base_listed(self) -> MergeConfig:
        """Return the config with the base as its last model, with the common parameters.

        Raises:
            ConfigError: the models have weights of their own, and there is none for the base.
        """
        schema = self.method.parameters
        own = any(_lookup(entry.parameters, schema, "weight") is not None for entry in self.models)
        if own and _lookup(self.parameters, schema, "weight") is None:
            raise ConfigError(
                f"{self.merge_method} merges the base, too, and {self.base_model} has no weight: list it under "
                "`models` with one (0 leaves it out), set a `weight` for all models, or leave out base_model"
            )
        return self.model_copy(update={"models": (*self.models, ModelEntry(model=self.base_model))})

    def options(
        self, tasks: int, name: str = "", position: float = 0.0, *, seeded_by: str | None = None
    ) -> MethodParameters:
        """Evaluate the parameters for one tensor.

        Args:
            tasks: number of fine-tuned models.
            name: name of the tensor, for filters.
            position: position of its layer in [0, 1], for gradients.
            seeded_by: name that random masks are drawn from; None means `name`.

        Raises:
            ConfigError: no tasks, or more than the method merges; `models` does not have one entry per task; values
                contradict each other.
        """
        if tasks < 1:
            raise ConfigError("a merge needs at least one fine-tuned model, got none")
        if self.method.tasks not in (None, tasks):
            raise ConfigError(self.method.wrong_number(tasks))
        if self.models and len(self.models) != tasks:
            keys = {key: None for entry in self.models if entry.model is None for key in entry.parameters}
            what, given = ", ".join(keys) or "models", len(self.models)
            raise ConfigError(f"{what}: got {given} for {tasks} fine-tuned models; give one per model")
        schema = self.method.parameters
        values: dict[str, Any] = {}
        for field_name, info in schema.model_fields.items():
            common = evaluate(_lookup(self.parameters, schema, field_name), name, position)
            if not schema.is_per_model(field_name):
                if common is not None:
                    values[field_name] = common
                continue
            fallback = info.default[0] if common is None else common
            own = [evaluate(_lookup(m.parameters, schema, field_name), name, position) for m in self.models]
            values[field_name] = tuple(fallback if v is None else v for v in own or [None] * tasks)
        return _parse(schema, values).for_tensor(name if seeded_by is None else seeded_by)

    def splits(self, shapes: Mapping[str, Shape], model_config: Mapping[str, Any] | None = None) -> Mapping[str, Shape]:
        """Return `split` with the sizes of known models in place of ``auto``.

        Args:
            shapes: shapes of all tensors.
            model_config: content of the base's ``config.json``.

        Raises:
            ConfigError: `split` is ``auto``, and no fused tensor is known.
        """
        return require_splits(model_config or {}, shapes) if self.split == "auto" else self.split

    def blocks(
        self, name: str, shape: Shape, shape_of: Callable[[str], Shape | None], splits: Mapping[str, Shape]
    ) -> Blocks:
        """Return how the method divides a tensor: see `blocks_of`."""
        if self.row_wise:
            return WHOLE
        flatten = self.conv == "flatten" and self.method.matrices_only
        return blocks_of(name, shape, shape_of, split=splits, flatten=flatten)

    def check_patterns(self, names: Collection[str]) -> None:
        """Refuse a pattern of `include`, `exclude` or `split`, and a choice of `router`, that would have no effect.

        Args:
            names: names of all tensors of the base.

        Raises:
            ConfigError: a pattern matches no name, or no tensor is a router; the message has the nearest name.
        """
        if self.router != "merge" and not any(map(is_router, names)):
            raise ConfigError(
                f"router: {self.router} has no effect: no tensor is the router of a mixture of experts, such as "
                "`layers.0.mlp.router.weight` or `layers.0.mlp.gate.weight`; leave it out, or use exclude"
            )
        split = () if self.split == "auto" else tuple(self.split)
        for key, patterns in (("include", self.include), ("exclude", self.exclude), ("split", split)):
            for pattern in patterns:
                if not any(fnmatchcase(name, pattern) for name in names):
                    wider = f"*{pattern.strip('*')}*"
                    meant = repr(nearest(pattern, list(names)) if names else "")
                    meant += f", or {wider!r}" if any(fnmatchcase(name, wider) for name in names) else ""
                    raise ConfigError(
                        f"{key}: {pattern!r} matches no tensor; a pattern matches whole names, with * for any "
                        f"text. Did you mean {meant}?"
                    )

    @property
    def is_divided(self) -> bool:
        """Whether the tensors of the output are merged from several sets of models, or copied from one."""
        return bool(self.slices or self.modules) or self.method.copies is not None

    def copies_values(self, options: MethodParameters) -> bool:
        """Whether the method, with these options, and the dtypes leave the values of its only model as they are."""
        copies = self.method.copies is not None and self.method.copies(options)
        return copies and (self.dtype is None or self.out_dtype in (None, self.dtype))

    @property
    def every_model(self) -> tuple[ModelEntry, ...]:
        """The models, also those of slices and modules."""
        return every_entry(self.models, self.slices, self.modules.values())

    @property
    def model_names(self) -> list[str]:
        """The models by name, each once."""
        return list(dict.fromkeys(str(entry.model) for entry in self.every_model))

    @model_validator(mode="after")
    def _check_parameters(self) -> MergeConfig:
        if self.parts_rank is not None and self.parts is None:
            raise ConfigError("parts_rank: there are no parts; set `parts` (--parts) to the folder that has them")
        if self.vocabulary is None and (self.tokens or self.pad_to_multiple_of is not None):
            name = "tokens" if self.tokens else "pad_to_multiple_of"
            raise ConfigError(f"{name}: needs a vocabulary to change; set `vocabulary`: base, union or model:PATH")
        if self.calibrate is not None and self.parts is not None:
            raise ConfigError("calibrate: a calibration reads the models, not their parts; merge without parts")
        if self.calibrate is not None and not self.method.forms_vectors(True):
            raise ConfigError(
                f"calibrate: {self.merge_method} changes no base; leave it out, or choose another method: "
                "task_arithmetic with normalize: true is the average of linear, multislerp is like karcher"
            )
        given = [name for name in ("models", "slices", "modules") if getattr(self, name)]
        if len(given) > 1:
            raise ConfigError(f"{' and '.join(given)}: a recipe has one of them")
        schema, where = self.method.parameters, f"parameters of {self.merge_method}"
        modules = [(f"{where}, module {name}", module) for name, module in self.modules.items()]
        slices = [(where, self.slices), *((label, module.slices) for label, module in modules)]
        parts = [(label, module.parameters) for label, module in modules]
        parts += [(f"{label}, of a slice", part.parameters) for label, own in slices for part in own]
        for label, parameters in [(where, self.parameters), *parts]:
            _check_keys(parameters, self.method, label)
        for entry in self.every_model:
            where = f"parameters of model {entry.model}" if entry.model else "parameters of a model"
            _check_keys(entry.parameters, self.method, where)
            for key in entry.parameters:
                if not schema.is_per_model(schema.names()[key]):
                    raise ConfigError(f"{where}: {key} is one value for all models; set it under `parameters`")
        return self


def as_config(config: MergeConfig | str, keywords: Mapping[str, Any]) -> MergeConfig:
    """Return `config`, or the config of the method of that name with `keywords`, as `MergeConfig` takes them.

    Raises:
        ConfigError: no such method or keyword, keywords beside a `MergeConfig`, or neither a config nor a name.
    """
    if isinstance(config, str):
        if config.endswith((".yaml", ".yml")):
            raise ConfigError(f"expected the name of a method, got {config!r}; use MergeConfig.from_yaml for a recipe")
        return MergeConfig(config, **keywords)
    if not isinstance(config, MergeConfig):
        raise ConfigError(
            f"expected the name of a method, such as 'ties', or a MergeConfig, got {type(config).__name__}"
        )
    if keywords:
        raise ConfigError(
            f"{', '.join(keywords)}: expected no parameters beside a MergeConfig; set them in the MergeConfig"
        )
    return config


def _sorted_keywords(data: dict[str, Any]) -> dict[str, Any]:
    """Move keywords that are parameters of the method to `parameters`, and lists of one value per model to `models`."""
    keywords = {key: value for key, value in data.items() if key not in MergeConfig.model_fields}
    method, parameters, models = data.get("merge_method", "rtsvm"), data.get("parameters", {}), data.get("models", ())
    valid = isinstance(method, str) and isinstance(parameters, Mapping) and isinstance(models, list | tuple)
    if not keywords or not valid:  # what is not valid gets its error from the model
        return {key: value for key, value in data.items() if key not in keywords}
    schema = get_method(method).parameters
    common, own = dict[str, Any](), dict[str, Any]()
    for key, value in keywords.items():
        value = plain_values(value)
        if key not in schema.names():
            raise ConfigError(_unknown_key(key, method))
        if key in parameters:
            raise ConfigError(f"{key} is given twice: as a keyword, and under `parameters`")
        if value is not None:
            (own if _is_one_per_model(schema, key, value) else common)[key] = value
    kept = {key: value for key, value in data.items() if key not in keywords}
    return {**kept, "models": _with_values(models, own), "parameters": {**parameters, **common}}


def _with_values(models: Sequence[Any], own: Mapping[str, Sequence[Any]]) -> Sequence[Any]:
    """Give each model its value of each parameter."""
    for key, values in own.items():
        models = models or [ModelEntry()] * len(values)
        if not values or len(values) != len(models):
            raise ConfigError(f"{key}: got {len(values)} value(s) for {len(models)} models; give one per model")
        entries = [ModelEntry(**entry) if isinstance(entry, Mapping) else entry for entry in as_entries(models)]
        if not all(isinstance(entry, ModelEntry) for entry in entries):
            return models  # what is not valid gets its error from the model
        models = [
            entry.model_copy(update={"parameters": {**entry.parameters, key: value}})
            for entry, value in zip(entries, values, strict=True)
        ]
    return models


def _is_one_per_model(schema: type[MethodParameters], key: str, value: object) -> bool:
    """Whether a value is a list for a parameter that each model may set for itself, and no list of filters."""
    field = schema.names().get(key)
    listed = isinstance(value, list | tuple) and filter_list(value) is None
    return listed and field is not None and schema.is_per_model(field)


def _unknown_key(key: str, method: object, *, fields: bool = True, under: str = "") -> str:
    """Say that no parameter of the method, nor a recipe field if those are keys too, has that name, and which is near.

    `under` says where the parameters belong, if not beside the fields.
    """
    names = METHODS[method].parameters.names() if isinstance(method, str) and method in METHODS else {}
    if under and key in names:
        return f"unknown key {key!r}: a recipe has the parameters of the method {under}"
    known = {"recipe fields": MergeConfig.model_fields.keys() if fields else (), f"parameters of {method}": names}
    lists = "; ".join(f"{what}: {', '.join(sorted(group))}" for what, group in known.items() if group)
    where = dict.fromkeys(names, under and f", {under}")
    return f"unknown key {key!r}; {did_you_mean(key, [*known['recipe fields'], *names], lists, where)}"


def _lookup(values: Mapping[str, Any], schema: type[MethodParameters], field_name: str) -> Any:
    for key, target in schema.names().items():
        if target == field_name and values.get(key) is not None:
            return values[key]
    return None


def _check_keys(values: Mapping[str, Any], method: Method, where: str) -> None:
    """Refuse unknown keys, a parameter given under two names, and values that are invalid for any tensor."""
    schema, keys = method.parameters, method.parameters.names()
    for key, value in values.items():
        if key in MergeConfig.model_fields and key not in keys:
            raise ConfigError(f"{where}: {key!r} is a recipe field, not a parameter; set it outside `parameters`")
        if key not in keys:
            raise ConfigError(f"{where}: {_unknown_key(key, method.name, fields=False)}")
        if sum(keys[key] == keys[other] for other in values if other in keys) > 1:
            raise ConfigError(f"{where}: {keys[key]} is given twice, under two names")
        check_filters(value, f"{where}: {key}")
        for leaf in leaves(value):
            if leaf is not None:
                _parse(schema, {keys[key]: leaf}, where)


def _parse(schema: type[MethodParameters], values: dict[str, Any], where: str = "parameters") -> MethodParameters:
    try:
        return schema(**values)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
