"""Arguments that describe a merge, shared by the subcommands, and the MergeConfig that they make."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .imports import uncollected
from .resources import size

if TYPE_CHECKING:
    from ..config import MergeConfig

CALIBRATION = ("calibrate", "calibrate_floor")
DTYPES = ("float64", "float32", "float16", "bfloat16")


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what to merge and how, with or without a recipe file."""
    group = parser.add_argument_group("what to merge, instead of a recipe file")
    group.add_argument("--base", metavar="B", help="base model: folder, .safetensors file or hub id")
    group.add_argument(
        "--model",
        metavar="M",
        action="append",
        default=[],
        help="a fine-tuned model, a LoRA adapter of the base, or model+adapter; repeat",
    )
    group.add_argument(
        "--weight",
        metavar="[NAME=]W",
        action="append",
        default=[],
        help="weight of a model, one each; or of the model of that name, also of a recipe or of parts",
    )
    group.add_argument(
        "--parts", metavar="PARTS", help="merge from the folder that `rtsvm decompose` wrote, alone or for the recipe"
    )
    group.add_argument("--parts-rank", type=int, metavar="K", help="use the K leading directions of parts in factors")
    group.add_argument("--method", help="merge method (default rtsvm); `rtsvm info` lists them")
    group = parser.add_argument_group("options, also on top of a recipe file")
    group.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], help="a method parameter, e.g. alpha=0.5; repeat"
    )
    group.add_argument("--dtype", choices=DTYPES, help="round the inputs to this dtype when they are loaded")
    group.add_argument("--out-dtype", choices=DTYPES, help="dtype of the output (default: --dtype, or the base's)")
    group.add_argument("--include", metavar="PATTERN", action="append", default=[], help="merge only these tensors")
    group.add_argument(
        "--exclude", metavar="PATTERN", action="append", default=[], help="these tensors keep the base's value; repeat"
    )
    group.add_argument(
        "--router", choices=("merge", "base", "mean"), help="routers of experts: merged, the base's, or the mean"
    )
    group.add_argument(
        "--vocabulary",
        metavar="V",
        help="align embeddings and heads by their tokens; the output has the tokens of the base (base), of all models "
        "(union) or of one (model:PATH)",
    )
    group.add_argument(
        "--missing",
        choices=("error", "base", "mean_of_present"),
        help="tensors that only some models have: refuse, keep the base's, or take the mean of the models that have "
        "them (default error)",
    )
    group.add_argument(
        "--conv", choices=("mean", "flatten"), help="convolutions under spectral methods: the mean, or as matrices"
    )
    group.add_argument(
        "--calibrate", choices=("svc",), help="calibrate the singular values of the merged update of each matrix"
    )
    group.add_argument(
        "--calibrate-floor", type=float, metavar="F", help="least response of a task that counts (default 0.1)"
    )
    group.add_argument(
        "--split",
        metavar="PATTERN=SIZES",
        action="append",
        default=[],
        help="matrices in fused tensors, e.g. '*qkv_proj*=4096,1024,1024'; repeat; or auto",
    )
    group.add_argument(
        "--requantise", action="store_true", help="write FP8 where the base has it, with new scales, not bfloat16"
    )
    group.add_argument(
        "--strict", action="store_true", help="refuse keys of a recipe that would be ignored with a warning"
    )
    group.add_argument(
        "--allow-pickle", action="store_true", help="read models that exist only as pickle (nothing but tensors)"
    )
    group.add_argument(
        "--shard-size", type=size, metavar="SIZE", default="5GB", help="largest output file (default %(default)s)"
    )


def one_weight_each(weights: list[float], models: list[str], option: str) -> None:
    """Require no weights, or as many as models.

    Raises:
        ConfigError: another number.
    """
    if weights and len(weights) != len(models):
        from ..errors import ConfigError

        raise ConfigError(f"--weight: expected one for each {option} ({len(models)}), got {len(weights)}")


def parse_weights(items: list[str]) -> tuple[list[float], dict[str, float]]:
    """Return the weights of `--weight` that are numbers alone, and those with names.

    Raises:
        ConfigError: a weight is not a number, or a name is given twice.
    """
    from ..errors import ConfigError

    plain, named = list[float](), dict[str, float]()
    for item in items:
        name, equals, text = item.rpartition("=")
        try:
            weight = float(text)
        except ValueError:
            weight = None
        if weight is None or bool(equals) != bool(name):
            raise ConfigError(f"--weight takes a number or NAME=NUMBER, got {item!r}")
        if name in named:
            raise ConfigError(f"--weight: {name} is given twice")
        if name:
            named[name] = weight
        else:
            plain.append(weight)
    return plain, named


def make_config(arguments: argparse.Namespace, recipe: str | None) -> MergeConfig:
    """Build the config from a recipe file, or from --base and --model, with the other options on top.

    Raises:
        ConfigError: the options contradict each other, or do not make a valid config.
    """
    with uncollected():
        from .. import engine  # noqa: F401  # every caller goes on with it
        from ..config import MergeConfig, ModelEntry
    from ..errors import ConfigError

    plain, named = parse_weights(arguments.weight)
    in_place = arguments.base or arguments.model or plain or arguments.method
    if recipe is not None:
        if in_place:
            raise ConfigError("give either a recipe file or --base/--model/--weight/--method, not both")
        if Path(recipe).is_dir() or recipe.endswith(".safetensors"):
            raise ConfigError(f"{recipe} is not a recipe file; name models with --base and --model")
        config = MergeConfig.from_yaml(recipe, strict=arguments.strict)
    elif arguments.parts is not None and not arguments.model:
        config = _recipe_of_parts(arguments, plain)
    else:
        if not arguments.model:
            raise ConfigError("nothing to merge: give a recipe file, or --base B --model A [--model C ...]")
        one_weight_each(plain, arguments.model, "--model")
        weights: list[float | None] = [*plain] or [None] * len(arguments.model)
        models = tuple(
            ModelEntry(model=model, parameters={} if weight is None else {"weight": weight})
            for model, weight in zip(arguments.model, weights, strict=True)
        )
        method = arguments.method or _method_of_parts(arguments.parts)
        config = MergeConfig(method, base_model=arguments.base, models=models)
    config = _with_weights(config, named)
    if arguments.parts is not None:
        from ..parts import from_parts

        config = from_parts(config, arguments.parts)
    changes: dict[str, Any] = {
        key: getattr(arguments, key)
        for key in ("dtype", "out_dtype", "missing", "router", "vocabulary", "conv", "parts_rank", *CALIBRATION)
        if getattr(arguments, key) is not None
    }
    changes |= {
        key: (*getattr(config, key), *getattr(arguments, key))
        for key in ("include", "exclude")
        if getattr(arguments, key)
    }
    changes |= {"requantise": True} if arguments.requantise else {}
    changes |= {"split": _parse_splits(arguments.split)} if arguments.split else {}
    changes["parameters"] = config.parameters | dict(_parse_setting(item) for item in arguments.set)
    fields: dict[str, Any] = {name: getattr(config, name) for name in type(config).model_fields}
    return MergeConfig(**(fields | changes))


def _method_of_parts(parts: str | None) -> str | None:
    """Return the method of a folder of parts; None without one."""
    from ..config import MergeConfig
    from ..parts_folder import PartsFolder

    return None if parts is None else MergeConfig.from_dict(PartsFolder.open(parts).recipe).merge_method


def _recipe_of_parts(arguments: argparse.Namespace, weights: list[float]) -> MergeConfig:
    """Return the recipe that was decomposed, with the base and the weights of the command."""
    from ..config import MergeConfig
    from ..errors import ConfigError
    from ..parts_folder import PartsFolder

    if arguments.method:
        raise ConfigError("--method: the parts are of one method; leave it out")
    folder = PartsFolder.open(arguments.parts)
    config = MergeConfig.from_dict(folder.recipe)
    names = [task.name for task in folder.tasks]
    one_weight_each(weights, names, f"task of {arguments.parts}: {', '.join(names)}")
    config = _with_weights(config, dict(zip(names, weights, strict=False)))
    return config if arguments.base is None else config.model_copy(update={"base_model": arguments.base})


def _with_weights(config: MergeConfig, weights: dict[str, float]) -> MergeConfig:
    """Return the recipe with other weights of the models of these names: paths, or names of their tasks.

    Raises:
        ConfigError: no model has such a name.
    """
    from ..errors import ConfigError
    from ..methods import did_you_mean
    from ..plan import tasks_of

    tasks, entries = tasks_of(config), list(config.models)
    for name, weight in weights.items():
        names = [task.name for task in tasks]
        found = [index for index, task in enumerate(tasks) if name in (task.name, task.model)]
        found = [names.index(name)] if name in names else found
        if len(found) != 1:
            known = f"the models are {', '.join(names)}"
            raise ConfigError(f"--weight: no model is named {name!r}; {did_you_mean(name, names, known)}")
        entry = entries[found[0]]
        entries[found[0]] = entry.model_copy(update={"parameters": {**entry.parameters, "weight": weight}})
    return config.model_copy(update={"models": tuple(entries)})


def _parse_splits(items: list[str]) -> str | dict[str, list[int]]:
    from ..errors import ConfigError

    if items == ["auto"]:
        return "auto"
    found = {}
    for item in items:
        pattern, _, sizes = item.rpartition("=")
        if not pattern or not all(size.strip().isdecimal() for size in sizes.split(",")):
            raise ConfigError(f"--split takes PATTERN=SIZE,SIZE,... or auto alone, got {item!r}")
        found[pattern] = [int(size) for size in sizes.split(",")]
    return found


def _parse_setting(item: str) -> tuple[str, Any]:
    from ..errors import ConfigError
    from ..safe_yaml import load_yaml

    key, equals, value = item.partition("=")
    if not (equals and key):
        raise ConfigError(f"--set takes KEY=VALUE, got {item!r}")
    try:
        return key.strip(), load_yaml(value)
    except ValueError as error:
        raise ConfigError(f"--set {key}: {value!r} is not a valid value: {error}") from error
