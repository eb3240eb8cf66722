"""Our merge methods as mergekit's."""

from __future__ import annotations

from typing import Annotated, Any, Optional, get_args, get_origin

from mergekit.merge_methods import (
    BasePolicy,
    GroupMergeMethod,
    InputContract,
    MergeMethodSpec,
    ParameterScope,
    TensorGroup,
    registered_methods,
)
from mergekit.merge_methods.base import ParameterSpec
from pydantic.fields import FieldInfo
from torch import Tensor

from ...config import MergeConfig, ModelEntry
from ...merge import merge_tensors
from ...methods import METHODS, Method
from . import INSTALLATION


class RegisteredMethod(GroupMergeMethod):
    """One of our merge methods under mergekit's interface."""

    def __init__(self, method: Method) -> None:
        self.method = method
        self.spec = MergeMethodSpec(
            name=method.name,
            pretty_name=method.pretty_name,
            reference_url=method.paper_url,
            parameters=_parameters(method),
            contract=InputContract(base=BasePolicy.REQUIRED if method.needs_base else BasePolicy.IGNORED),
        )

    def merge_group(self, group: TensorGroup, /, **parameters: Any) -> Tensor:
        """Merge one tensor. The models are in the recipe's order; those without the tensor are not among them."""
        tuned = group.non_base if self.method.needs_base else group.entries
        base = group.base.tensor if self.method.needs_base else tuned[0].tensor
        if not tuned:
            result: Tensor = base
            return result
        given = {name: value for name, value in parameters.items() if value is not None}
        own = {p.name for p in self.spec.input_parameters} & given.keys()
        config = MergeConfig(
            merge_method=self.method.name,
            models=tuple(ModelEntry(parameters={name: given[name][entry.id] for name in own}) for entry in tuned),
            parameters={name: value for name, value in given.items() if name not in own},
        )
        INSTALLATION.count(self.method.name)
        return merge_tensors(base, [entry.tensor for entry in tuned], config, name=group.metadata.name or "").weight


def merge_methods() -> list[RegisteredMethod]:
    """Return our merge methods that mergekit lacks, for its `register`: what the entry point names."""
    present = {method.spec.name for method in registered_methods()}
    return [RegisteredMethod(method) for name, method in METHODS.items() if name not in present]


def _parameters(method: Method) -> tuple[ParameterSpec, ...]:
    """Describe every key that our recipes accept, except lists: in mergekit a list is a gradient."""
    schema = method.parameters
    per_model = ParameterScope.NON_BASE if method.needs_base else ParameterScope.INPUT
    specs = []
    for key, name in schema.names().items():
        info = schema.model_fields[name]
        if schema.is_per_model(name):
            number, default = get_args(info.annotation)[0], info.default[0]
            specs.append(ParameterSpec(key, number, per_model, default, info.description))
        elif get_origin(info.annotation) is not list:
            # None means our own default, so that of two names for one parameter only the given one counts.
            specs.append(ParameterSpec(key, _optional(info), ParameterScope.SHARED, None, info.description))
    return tuple(specs)


def _optional(info: FieldInfo) -> Any:
    parts = (info.annotation, *info.metadata)
    constrained: Any = Annotated[parts] if info.metadata else info.annotation
    return Optional[constrained]  # noqa: UP045  # the type is known only at run time
