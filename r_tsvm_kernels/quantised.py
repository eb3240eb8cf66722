"""Recognise quantised weights: packed integers or 8-bit floats with separate scales."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Protocol

import torch
from torch import Tensor

from .errors import QuantisedRefusedError
from .text import dtype_name

# Files that quantisers write beside the weights, in lower case.
QUANTISATION_FILES = (
    "quant.json", "quant_*.json", "*quant_config*.json", "*quanti[sz]e_*.json", "*quanti[sz]ation.json",
    "*quanti[sz]ation_*.json", "awq_*.json", "gptq_*.json",
)  # fmt: skip
_CONFIG_KEYS = ("quantization_config", "compression_config")
_MLX_KEY = "quantization"

# Last parts of names that only packed weights have; some are one row, or 64-bit integers.
_PACKED = re.compile(r"qweight|qzeros|q_weight|W_q|(?:.*_)?weight_packed|Qidxs(?:_\d+)?|dense_weights")

# Tensors that formats store beside a packed weight: last part of their name, last part of the weight's, format.
_BESIDE = {
    "scales": (("qweight", "GPTQ or AWQ"), ("weight", "MLX, or integers with scales")),
    "qzeros": (("qweight", "GPTQ or AWQ"),),
    "g_idx": (("qweight", "GPTQ or AWQ"),),
    "biases": (("weight", "MLX"),),
    "SCB": (("weight", "bitsandbytes, 8 bits"),),
    "scale_weight": (("weight", "8 bits with scales"),),
    "scale": (("weight", "8 bits with scales"), ("W_q", "HQQ")),
    "zero": (("W_q", "HQQ"),),
    "_scale": (("_data", "quanto"), ("_data._data", "quanto, 4 bits")),
    "codebooks": (("codes", "AQLM"),),
    "q_scale": (("q_weight", "ExLlamaV2"),),
    "svh": (("trellis", "ExLlamaV3"),),
}
# The same for names that are the weight's with a suffix: `gate_up_proj_scales` beside `gate_up_proj_blocks`.
_SUFFIXED = re.compile(r"(.+)_(?:scales?|scale_inv|scale_2|global_scale|zero_point|shape)")
_SUFFIXES = (("", "8 bits with scales"), ("_blocks", "MXFP4"), ("_packed", "compressed-tensors"), ("_qdata", "torchao"))
# The same for names that are the weight's with one more part: `q_proj.weight.absmax`.
_PARTS = re.compile(r"\.(?:(?:nested_)?(?:absmax|quant_map)|quant_state\.[^.]*)$")
# The same for weights with indices into a table: `q_proj.indices` beside `q_proj.centroids.weight`.
_TABLE = re.compile(r"(.*\.|)((?:res_)?)centroids\.weight")


class Described(Protocol):
    """A tensor, or the header of one."""

    @property
    def dtype(self) -> torch.dtype:
        """Of its values."""

    @property
    def shape(self) -> Sequence[int]:
        """Of its values."""


def refuse_quantised(
    label: object,
    tensors: Mapping[str, Described],
    config: Mapping[str, Any] | None = None,
    files: Iterable[str] = (),
) -> None:
    """Raise an error if a model's weights are quantised, judged by its tensors, configuration and files.

    Args:
        label: name of the model, for the message.
        tensors: every tensor of the model, or its header.
        config: content of its ``config.json``.
        files: names of the files beside the weights. One of `QUANTISATION_FILES` may be left over from another model,
            so it only counts if some tensor may be packed.

    Raises:
        QuantisedRefusedError: it is quantised; the message names the format, the tensor or the key.

    Examples:
        >>> refuse_quantised("model", {"q.weight": torch.ones(4, 4), "q.scales": torch.ones(4)})  # floats: fine
    """
    reason = _by_tensors(tensors) or _by_config(config or {})
    theirs = [name for name in files if any(fnmatchcase(name.lower(), kind) for kind in QUANTISATION_FILES)]
    if theirs and not reason:
        packed = next((name for name, tensor in tensors.items() if may_be_packed(tensor)), None)
        if packed is not None:
            reason = f"{theirs[0]} is beside it, and {packed} is {_described(tensors[packed])}"
    if reason:
        raise QuantisedRefusedError(
            f"{label}: the checkpoint is quantised: {reason}. Packed weights and their scales cannot be "
            "merged. Dequantise every model, or use the unquantised releases, and merge those"
        )


def may_be_packed(tensor: Described) -> bool:
    """Whether a tensor may be a packed weight: two or more dimensions, of 8-bit floats or integers below 64 bits."""
    dtype = tensor.dtype
    integer = not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool) and dtype.itemsize < 8
    return len(tensor.shape) >= 2 and (integer or _is_float8(dtype))


def must_agree(tensor: Described, *, excluded: bool) -> bool:
    """Whether the base's value of a tensor may be kept only if all models have the same.

    True for integers, bools and 8-bit floats of two or more dimensions, which may be weights in an unknown format;
    False for counters and other buffers of one dimension. An excluded tensor may differ if it cannot be packed:
    excluding a packed weight would merge its scales without it.
    """
    if excluded:
        return may_be_packed(tensor)
    other = tensor.dtype.is_floating_point or tensor.dtype.is_complex
    return len(tensor.shape) >= 2 and (not other or _is_float8(tensor.dtype))


def same_values(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors hold the same values; of the same dtype: the same bytes."""
    if first.shape != second.shape:
        return False
    second = second.to(first.device)
    if first.dtype == second.dtype:
        raw = (tensor.contiguous().flatten().view(torch.uint8) for tensor in (first, second))
    else:
        floating = first.dtype.is_floating_point or second.dtype.is_floating_point
        raw = (tensor.to(torch.float64 if floating else torch.int64) for tensor in (first, second))
    return torch.equal(*raw)


def differing_error(name: str, label: object, tensor: Described, base: Described) -> QuantisedRefusedError:
    """Return the error for a tensor of the model `label` that must be equal to the base's and is not."""
    advice = "If these are packed weights, dequantise every model and merge those"
    if not may_be_packed(base):
        advice += "; if the base's table is right for the merge, exclude it"
    return QuantisedRefusedError(
        f"{name} of {label}: {_described(tensor)}, differs from the base's, which is {_described(base)}. Integers and "
        f"8-bit floats of two or more dimensions are kept only where all models have the same. {advice}"
    )


def _by_tensors(tensors: Mapping[str, Described]) -> str:
    """Return which tensor shows that a model is quantised, or an empty string."""
    for name, tensor in tensors.items():
        if _is_packed(name.rpartition(".")[2], tensor):
            return f"{name} is {_described(tensor)}"
        for packed, form in _weights_beside(name):
            if packed in tensors and may_be_packed(tensors[packed]):
                return f"{packed} is {_described(tensors[packed])}, and {name} belongs to it ({form})"
    return ""


def _is_packed(last: str, tensor: Described) -> bool:
    """Whether the last part of its name and its dtype show that a tensor is packed."""
    float8 = _is_float8(tensor.dtype)
    if last == "weight":  # for integers, the scales may have any name
        return may_be_packed(tensor) and not float8
    return bool(_PACKED.fullmatch(last) and tensor.shape) and (float8 or not tensor.dtype.is_floating_point)


def _weights_beside(name: str) -> Iterator[tuple[str, str]]:
    """Yield the names of packed weights that a tensor of this name would belong to, each with its format."""
    module, dot, last = name.rpartition(".")
    for packed, form in _BESIDE.get(last, ()):
        yield f"{module}{dot}{packed}", form
    if found := _SUFFIXED.fullmatch(last):
        for suffix, form in _SUFFIXES:
            yield f"{module}{dot}{found[1]}{suffix}", form
    if found := _PARTS.search(name):
        yield name[: found.start()], "bitsandbytes, 4 bits"
    if found := _TABLE.fullmatch(name):
        yield f"{found[1]}{found[2]}indices", "VPTQ"


def _by_config(config: Mapping[str, Any]) -> str:
    """Return which key of a configuration, nested ones included, says that the model is quantised."""
    waiting: list[tuple[str, Mapping[str, Any]]] = [("", config)]
    while waiting:
        path, part = waiting.pop()
        mlx = part.get(_MLX_KEY)
        keys = [key for key in _CONFIG_KEYS if part.get(key)]
        keys += [_MLX_KEY] if isinstance(mlx, dict) and mlx.keys() & {"bits", "group_size", "mode"} else []
        if keys:
            return f"config.json has {path}{keys[0]}; if its weights are not, remove the key"
        waiting += [(f"{path}{key}.", value) for key, value in part.items() if isinstance(value, dict)]
    return ""


def _is_float8(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize == 1


def _described(tensor: Described) -> str:
    """Return dtype and shape, as in ``int32 of 16 x 2``."""
    return f"{dtype_name(tensor.dtype)} of {' x '.join(map(str, tensor.shape))}"
