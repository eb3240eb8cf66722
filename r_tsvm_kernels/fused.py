"""Fused projections of known models: how many rows of a tensor belong to each of the matrices in it.

Only tensors that hold their matrices one after the other are listed. Where the heads of q, k and v alternate (GPT-NeoX,
Falcon, BLOOM), or the columns of gate and up (gpt-oss), no sizes describe them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .errors import ConfigError

Shape = tuple[int, ...]

# Names of tensors that are q, k and v of one width, whatever the model: torch's MultiheadAttention, timm's attention.
_THIRDS = ("in_proj_weight", "in_proj_bias", "attn.qkv.weight", "attn.qkv.bias")


def known_splits(config: Mapping[str, Any], shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """Return the sizes of the blocks of every fused tensor that is known, by its name.

    Args:
        config: content of the model's ``config.json``; may be empty.
        shapes: shapes of the model's tensors.

    Examples:
        >>> known_splits({"model_type": "gpt2", "n_embd": 8}, {"h.0.attn.c_attn.weight": (8, 24)})
        {'h.0.attn.c_attn.weight': (8, 8, 8)}
        >>> known_splits({}, {"attn.in_proj_weight": (24, 8), "attn.out_proj.weight": (8, 8)})
        {'attn.in_proj_weight': (8, 8, 8)}
    """
    modules = _modules(config)
    for part in config.values():
        if isinstance(part, Mapping):  # the parts of a multimodal model
            modules |= _modules(part)
    found = {}
    for name, shape in shapes.items():
        sizes = next((sizes for module, sizes in modules.items() if module in name.split(".")), None)
        if sizes is None and name.endswith(_THIRDS) and shape and shape[0] % 3 == 0:
            sizes = (shape[0] // 3,) * 3
        if sizes and sum(sizes) in shape[:2]:
            found[name] = sizes
    return found


def require_splits(config: Mapping[str, Any], shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """Return `known_splits`.

    Raises:
        ConfigError: no fused tensor is known.
    """
    found = known_splits(config, shapes)
    if not found:
        raise ConfigError(
            "split: auto knows no fused tensor of this model; give the sizes, as in "
            '{"*qkv_proj*": [4096, 1024, 1024]}, or leave it out'
        )
    return found


def _modules(config: Mapping[str, Any]) -> dict[str, Shape]:
    """Return the sizes by the names of modules."""
    kind = config.get("model_type")
    width = _whole(config, "hidden_size", "n_embd", "d_model")
    heads = _whole(config, "num_attention_heads", "n_head", "n_heads")
    head = _whole(config, "head_dim", "kv_channels") or (width // heads if heads else 0)
    groups = _whole(config, "num_key_value_heads", "multi_query_group_num") or heads
    inner = _whole(config, "intermediate_size", "ffn_hidden_size")
    grouped, thirds, halves = (heads * head, groups * head, groups * head), (width,) * 3, (inner,) * 2
    if kind == "chatglm" and not config.get("multi_query_attention", True):
        grouped = thirds
    attention = config.get("attn_config")
    if kind == "dbrx" and isinstance(attention, Mapping) and heads:
        own = _whole(attention, "kv_n_heads") * (width // heads)
        grouped = (width, own, own)
    known: dict[object, dict[str, Shape]] = {
        "phi3": {"qkv_proj": grouped, "gate_up_proj": halves},
        "phi4_multimodal": {"qkv_proj": grouped, "gate_up_proj": halves},
        "glm": {"gate_up_proj": halves},
        "glm4": {"gate_up_proj": halves},
        "chatglm": {"query_key_value": grouped, "dense_h_to_4h": halves},
        "gpt2": {"c_attn": thirds},
        "qwen": {"c_attn": thirds},
        "baichuan": {"W_pack": thirds},
        "mpt": {"Wqkv": thirds},
        "dbrx": {"Wqkv": grouped},
    }
    return {module: sizes for module, sizes in known.get(kind, {}).items() if min(sizes) > 0}


def _whole(config: Mapping[str, Any], *keys: str) -> int:
    """Return the first of the settings that is a positive whole number, or 0."""
    return next((value for key in keys if type(value := config.get(key)) is int and value > 0), 0)
