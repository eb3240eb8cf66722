"""Our merge methods in sd-mecha's recipes: `install`, then use them as sd-mecha's own.

from r_tsvm_kernels.integrations import sd_mecha as rtsvm_methods

rtsvm = rtsvm_methods.install()["rtsvm"]
recipe = rtsvm(sd_mecha.model("base.safetensors"), sd_mecha.model("a.safetensors"), sd_mecha.model("b.safetensors"))
sd_mecha.merge(recipe, output="merged.safetensors")
"""

from __future__ import annotations

import inspect
from typing import Any, get_origin

from pydantic.fields import FieldInfo
from torch import Tensor

from ..config import MergeConfig, ModelEntry
from ..errors import ConfigError
from ..merge import merge_tensors
from ..methods import METHODS, Method
from .installation import Installation

# Keywords that sd-mecha passes to functions that accept any, beside the key of the tensor.
_CONTEXT = ("key_relation", "cache", "output_reused")

_TYPES: dict[Any, type] = {bool: bool, int: int, float: float}


def install() -> dict[str, Any]:
    """Register the merge methods that sd-mecha lacks, with the parameters they have in our recipes.

    A method takes the base and then the fine-tunes (a method without a base: the models), all in weight space. It takes
    its parameters by keyword, for the whole model or by tensor, like all methods of sd-mecha. Parameters with one value
    per model, such as ``weight`` and ``density``, take one number for all or a string with one for each, ``"1, 0.5,
    2"``. Lists (``exclude_keys``) are not supported. sd-mecha's own methods keep their names (``slerp``,
    ``model_stock``). After the installation, sd-mecha can read recipes that name our methods from files.

    Calling it again changes nothing. Warns once if the version of sd-mecha was never tested.

    Returns:
        The registered methods by name, for building recipes.

    Raises:
        IntegrationError: sd-mecha is not installed, too old, or not built as expected.
    """
    INSTALLATION.install()
    methods: dict[str, Any] = INSTALLATION.patches.methods
    return dict(methods)


def uninstall() -> None:
    """Remove our methods from sd-mecha. Does nothing if nothing is installed."""
    INSTALLATION.uninstall()


def calls() -> dict[str, int]:
    """Return how many tensors sd-mecha merged by each of our methods in this process."""
    return INSTALLATION.calls()


class _Registered:
    """Adds our methods to sd-mecha's registry."""

    def __init__(self) -> None:
        from sd_mecha.extensions import merge_methods

        present = {method.identifier for method in merge_methods.get_all()}
        self.methods: dict[str, Any] = {}
        try:
            for name, method in METHODS.items():
                if name not in present:
                    function = _as_function(method, merge_methods)
                    self.methods[name] = merge_methods.merge_method(function, identifier=name)
        except BaseException:
            self.undo()
            raise

    def undo(self) -> None:
        """Remove them."""
        from sd_mecha.extensions import merge_methods

        for name in self.methods:
            merge_methods._module_state.merge_methods_registry.pop(name, None)  # no public function does this


INSTALLATION = Installation("sd-mecha", ["1.1.8"], _Registered)


def _as_function(method: Method, sd_mecha: Any) -> Any:
    """Return a function with the signature that sd-mecha's decorator reads."""
    schema = method.parameters

    def merge(*tensors: Tensor, key: str, **given: Any) -> Tensor:
        base, tuned = (tensors[0], tensors[1:]) if method.forms_vectors(True) else (None, tensors)
        values = {name: value for name, value in given.items() if name not in _CONTEXT and value is not None}
        own = {
            name: _spread(name, values.pop(name), len(tuned), words=isinstance(info.default[0], str))
            for name, info in schema.model_fields.items()
            if name in values and schema.is_per_model(name)
        }
        config = MergeConfig(
            merge_method=method.name,
            models=tuple(ModelEntry(parameters={name: own[name][task] for name in own}) for task in range(len(tuned))),
            parameters=values,
        )
        INSTALLATION.count(method.name)
        return merge_tensors(base, tuned, config, name=key).weight

    tensor = sd_mecha.Parameter(Tensor, "weight")
    parameters = [inspect.Parameter("models", inspect.Parameter.VAR_POSITIONAL, annotation=tensor)]
    if method.forms_vectors(True):
        parameters.insert(0, inspect.Parameter("base", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=tensor))
    for name, info in schema.model_fields.items():
        kind = _type_of(schema.is_per_model(name), info)
        if kind is not None:
            # None means our own default.
            annotation = sd_mecha.Parameter(kind, "param")
            parameters.append(
                inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
            )
    parameters.append(inspect.Parameter("context", inspect.Parameter.VAR_KEYWORD))
    function: Any = merge
    function.__signature__ = inspect.Signature(parameters, return_annotation=sd_mecha.Return(Tensor, "weight"))
    function.__name__, function.__doc__ = method.name, f"{method.pretty_name}; see {method.paper_url}."
    return function


def _type_of(per_model: bool, info: FieldInfo) -> type | None:
    """Return the type of a parameter in sd-mecha; None for lists, which sd-mecha does not have."""
    if get_origin(info.annotation) is list:
        return None
    # Declared as strings: sd-mecha passes numbers unchanged then, too.
    return str if per_model else _TYPES.get(info.annotation, str)


def _spread(name: str, value: Any, models: int, *, words: bool = False) -> list[float | str]:
    """Return one number per model, or one word if the parameter takes words."""
    found = list[float | str]()
    for part in str(value).split(","):
        try:
            found.append(float(part))
        except ValueError:
            found += [part.strip()] if words else []
    if len(found) not in (1, models):
        raise ConfigError(
            f'{name}: expected a number, or one for each of the {models} models as in "1, 0.5", got {value!r}'
        )
    return found * models if len(found) == 1 else found
