"""Kinds of tensors: those of all layers that a merge treats in the same way, as `rtsvm inspect` shows them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..text import dtype_name

if TYPE_CHECKING:
    from ..plan import MergePlan


@dataclass(frozen=True)
class Kind:
    """Tensors whose names differ only in whole numbers, with one shape, dtype and treatment.

    Attributes:
        label: the name, with ranges in place of the numbers: ``model.layers.0-31.mlp.up_proj.weight``.
        names: of the tensors.
        parameters: the values that gradients and filters give them, as text.
    """

    label: str
    names: tuple[str, ...]
    parameters: dict[str, str]


def kinds_of(plan: MergePlan, *, each: bool = False) -> list[Kind]:
    """Group the tensors of a plan, in its order.

    Args:
        plan: the merge.
        each: make each tensor a kind of its own.
    """
    groups: dict[object, list[str]] = {}
    for name, tensor in plan.tensors.items():
        pattern = name if each else tuple("" if part.isdecimal() else part for part in name.split("."))
        key = (pattern, tensor.treatment, tensor.spec.shape, tensor.spec.dtype, tensor.merged_apart)
        groups.setdefault(key, []).append(name)
    return [Kind(label(names), tuple(names), _parameters(plan, names)) for names in groups.values()]


def label(names: Sequence[str]) -> str:
    """Return names that differ only in whole numbers as one, with ranges.

    Examples:
        >>> label(["layers.0.up", "layers.1.up", "layers.2.up", "layers.5.up"])
        'layers.0-2,5.up'
    """
    parts = zip(*(name.split(".") for name in names), strict=True)
    return ".".join(part[0] if len(set(part)) == 1 else _ranges(sorted(set(map(int, part)))) for part in parts)


def _ranges(numbers: Sequence[int]) -> str:
    """Return sorted numbers as ``0-2,5``; as ``0,2,..,30`` if there are more than three ranges."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    text = [str(first) if first == last else f"{first}-{last}" for first, last in found]
    return ",".join(text if len(text) <= 3 else [*text[:2], "..", text[-1]])


def _parameters(plan: MergePlan, names: Sequence[str]) -> dict[str, str]:
    """Return the values that gradients and filters give to the parameters of these tensors."""
    from ..plan import varying_parameters

    tensors = [plan.tensors[name] for name in names]
    if tensors[0].treatment.kind == "base":
        return {}
    config = plan.section(names[0]).config
    values = [varying_parameters(config, tensor.options) for tensor in tensors]
    used = values[0].keys() if tensors[0].treatment.kind == "merge" else values[0].keys() & {"weight", "alpha"}
    return {key: spread([value[key] for value in values]) for key in values[0] if key in used}


def spread(values: Sequence[Any]) -> str:
    """Return one value, or a range, of each model if models have their own.

    Examples:
        >>> spread([0.5, 0.5]), spread([0.5, 1.0]), spread([[1.0, 0.0], [1.0, 1.0]])
        ('0.5', '0.5..1', '1 / 0..1')
    """
    if all(isinstance(value, list) and value for value in values):
        parts = [spread(part) for part in zip(*values, strict=True)]
        return parts[0] if len(set(parts)) == 1 else " / ".join(parts)
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    if len(numbers) < len(values):
        return " or ".join(_distinct(map(plain_text, values)))
    low, high = plain_text(min(numbers)), plain_text(max(numbers))
    return low if low == high else f"{low}..{high}"


def plain_text(value: Any) -> str:
    """Return a value as a recipe has it, numbers with four digits."""
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(plain_text, value))}]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def common_values(plan: MergePlan) -> dict[str, str]:
    """Return the parameters that no gradient and no filter sets, as text, of each model if they differ."""
    from ..plan import common_parameters, model_parameters, varying_parameters

    config = plan.config
    any_options = next(iter(plan.tensors.values())).options
    varying = varying_parameters(config, any_options)
    found = {}
    for key, value in common_parameters(config).items():
        if key not in varying:
            own = [entry.get(key, value) for entry in model_parameters(config)]
            found[key] = spread([own]) if config.method.parameters.is_per_model(key) and own else plain_text(value)
    return found


def dtypes_of(plan: MergePlan) -> str:
    """Return the dtypes of the output."""
    return ", ".join(_distinct(dtype_name(tensor.spec.dtype) for tensor in plan.tensors.values()))


def _distinct(texts: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(texts))
