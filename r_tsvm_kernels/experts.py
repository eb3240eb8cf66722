"""Names of packed experts and of routers in mixtures of experts.

Models hold their experts one by one, or packed: one tensor (E, m, n) for the same matrix of all E experts, as gpt-oss,
Llama 4 and the state dicts of transformers 5 do. Only names tell them from other tensors of three dimensions, such as
weights of convolutions.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import pairwise

# Modules that hold experts.
_PLACES = {"experts", "moe", "block_sparse_moe"}
# Layers of packed experts under another name (JetMoe, Granite).
_LAYERS = {"input_linear", "output_linear"}
# A part of a name that selects one expert, or belongs to a convolution.
_SELECTED = re.compile(r"\d+|expert_?\d+")
_ONE = re.compile(r"\d+|expert_?\d+|.*conv.*")
_EXPERTS = re.compile(r"(?:^|\.)experts\.(\d+\.)?\w+")
_ROUTER = re.compile(r"(?:.*\.)?(?:router|gate)\.(?:weight|bias|e_score_correction_bias|(?:wg|layer|classifier)\.\w+)")
_ROUTER_BIAS = re.compile(r"(?:.*\.)?(?:router_bias|e_score_correction_bias)")
# Two matrices in one, and the name of the layer after it.
_FUSED = {"gate_up_proj": "down_proj", "input_linear": "output_linear"}


def are_experts(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor holds the same matrix (m, n) of several experts, packed as (E, m, n), or their biases (E, n).

    Examples:
        >>> are_experts("model.layers.0.mlp.experts.down_proj", (8, 16, 32))
        True
        >>> are_experts("model.layers.0.mlp.experts.3.down_proj.weight", (16, 32))
        False
        >>> are_experts("encoder.conv1.weight", (64, 32, 3))
        False
    """
    parts = name.split(".")
    place = next((i for i, part in enumerate(parts) if part in _PLACES or part in _LAYERS), None)
    if place is None or any(_ONE.fullmatch(part) for part in parts[place + 1 :]):
        return False
    return len(shape) == 3 or (len(shape) == 2 and parts[-1].endswith("bias"))


def layout_of_experts(names: Iterable[str]) -> str | None:
    """Return how experts are stored, ``packed`` or ``one by one``, as the first names of experts say; None without any.

    Examples:
        >>> layout_of_experts(["norm.weight", "layers.0.mlp.experts.3.down_proj.weight"])
        'one by one'
        >>> layout_of_experts(["layers.0.mlp.experts.down_proj"])
        'packed'
    """
    found = next(filter(None, map(_EXPERTS.search, names)), None)
    return None if found is None else "one by one" if found[1] else "packed"


def is_router(name: str) -> bool:
    """Whether a tensor is the weight or a bias of a router, which chooses the experts of a token.

    Examples:
        >>> [is_router(f"layers.0.mlp.{name}") for name in ("router.weight", "gate.weight", "gate_proj.weight")]
        [True, True, False]
    """
    return bool(_ROUTER.fullmatch(name) or _ROUTER_BIAS.fullmatch(name))


def is_of_one_expert(module: str) -> bool:
    """Whether a module belongs to one expert of a model that holds its experts one by one.

    Examples:
        >>> is_of_one_expert("model.layers.0.mlp.experts.3.up_proj"), is_of_one_expert("model.layers.0.mlp.up_proj")
        (True, False)
    """
    parts = module.split(".")
    return any(a in _PLACES and _SELECTED.fullmatch(b) for a, b in pairwise(parts))


def layer_after(name: str) -> str | None:
    """Return the name of the matrix that follows two fused ones, the projections ``gate`` and ``up`` of experts.

    Examples:
        >>> layer_after("model.layers.0.mlp.experts.gate_up_proj")
        'model.layers.0.mlp.experts.down_proj'
    """
    parts = name.split(".")
    found = [i for i, part in enumerate(parts) if part in _FUSED]
    if not found:
        return None
    parts[found[-1]] = _FUSED[parts[found[-1]]]
    return ".".join(parts)
