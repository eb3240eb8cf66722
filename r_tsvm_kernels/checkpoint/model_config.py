"""Facts of a model's ``config.json``: layers, vocabulary, and what must agree for weights to mean the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

# The part of a multimodal model's config that describes its language model.
_TEXT = ("text_config", "llm_config", "language_config")
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
# Settings that change what the same weights compute.
_MEANING = (
    "model_type", "architectures", "num_attention_heads", "n_head", "num_heads", "num_key_value_heads", "head_dim",
    "rope_theta", "rope_type", "rope_factor", "partial_rotary_factor", "rotary_pct", "position_embedding_type",
    "max_position_embeddings", "sliding_window", "layer_types", "hidden_act", "hidden_activation",
    "activation_function", "num_experts_per_tok", "norm_topk_prob", "scoring_func", "query_pre_attn_scalar",
    "attn_logit_softcapping", "final_logit_softcapping", "logit_scale", "embedding_multiplier", "residual_multiplier",
    "attention_multiplier", "logits_scaling", "tie_word_embeddings",
)  # fmt: skip

# Lists of the indexes of some layers.
_INDEX_LISTS = (
    "mlp_only_layers", "full_attn_idxs", "cross_attention_layers", "attn_layer_indices", "moe_layers",
    "global_attn_layers", "full_attention_layers",
)  # fmt: skip
# Numbers by which the index of a layer decides its kind.
_BY_INDEX = (
    "first_k_dense_replace", "moe_layer_freq", "decoder_sparse_step", "full_attention_interval",
    "sliding_window_pattern", "interleave_moe_layer_step", "attn_layer_period", "attn_layer_offset",
    "expert_layer_period", "expert_layer_offset", "no_rope_layer_interval", "num_kv_shared_layers",
)  # fmt: skip
_STARTS = ("first_k_dense_replace", "attn_layer_offset", "expert_layer_offset", "num_kv_shared_layers")


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of a config that describes the language model, often all of it."""
    return next((config[key] for key in _TEXT if isinstance(config.get(key), dict)), config)


def layer_count(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the number of layers, and that of the layers behind them that predict further tokens; None if unknown."""
    for part in (text_config(config), config):
        layers = next(filter(None, (_count(part.get(key)) for key in _LAYERS)), 0)
        if layers:
            return layers, _count(part.get("num_nextn_predict_layers"))
    return None


def with_layers(config: Mapping[str, Any], origins: Sequence[tuple[Mapping[str, Any], int]]) -> dict[str, Any]:
    """Return the config of a model whose layers come from other models.

    The number of layers, lists with a value for each layer (``layer_types``) and lists of indexes of layers
    (``mlp_only_layers``) change.

    Args:
        config: of the model that gives all else.
        origins: for each layer, the config of its model, and the layer's index there.

    Examples:
        >>> base = {"num_hidden_layers": 2, "layer_types": ["full", "sliding"], "hidden_size": 8}
        >>> with_layers(base, [(base, 0), (base, 1), (base, 1)])
        {'num_hidden_layers': 3, 'layer_types': ['full', 'sliding', 'sliding'], 'hidden_size': 8}
    """
    inner = text_config(config)
    changed = {key: with_layers(value, origins) if value is inner else value for key, value in config.items()}
    before = layer_count(config)
    parts = [(text_config(own), index, layer_count(own)) for own, index in origins]
    for key, value in config.items():
        if key in _LAYERS and _count(value) and before is not None:
            changed[key] = len(origins)
        elif key in _INDEX_LISTS and isinstance(value, list):
            changed[key] = [place for place, (own, index, _) in enumerate(parts) if index in (own.get(key) or ())]
        elif isinstance(value, list | str) and before is not None and _is_by_layer(key, value, before[0]):
            found = [
                own[key][index]
                for own, index, count in parts
                if count is not None and isinstance(own.get(key), type(value)) and len(own[key]) == count[0]
            ]
            if len(found) == len(origins):
                changed[key] = "".join(found) if isinstance(value, str) else found
    return changed


def layer_rules(config: Mapping[str, Any]) -> list[str]:
    """Return the settings by which a layer's index decides its kind, as ``first_k_dense_replace 1``.

    Examples:
        >>> layer_rules({"first_k_dense_replace": 1, "decoder_sparse_step": 1})
        ['first_k_dense_replace 1']
    """
    text = text_config(config)
    return [f"{key} {text[key]}" for key in _BY_INDEX if _count(text.get(key)) > (key not in _STARTS)]


def _is_by_layer(key: str, value: Sequence[Any], layers: int) -> bool:
    """Whether a list of a config, or a text, has a value for each layer."""
    if isinstance(value, str):
        return key.endswith("_pattern") and len(value) == layers
    foreign = key.endswith(("_id", "_ids", "_token", "_index", "_section")) or key == "architectures"
    return len(value) == layers and not foreign


def contradictions(config: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Return the settings in which two configs give the same weights another meaning.

    A setting that only one config has is its class's default in the other, and not compared.

    Examples:
        >>> contradictions({"rope_theta": 1e4, "head_dim": 64}, {"rope_theta": 1e6})
        ['rope_theta 1000000.0 instead of 10000.0']
    """
    first, second = (dict(_settings(x)) for x in (config, other))
    return [
        f"{key} {_shown(second[key])} instead of {_shown(value)}"
        for key, value in first.items()
        if second.get(key) is not None and second[key] != value
    ]


def _settings(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    text = text_config(config)
    # A language model may be merged into a multimodal one, so that its settings are those of the inner config.
    for part, prefix in [(text, "")] + ([] if text is config else [(config, "top-level ")]):
        found = {**part, **_rope(part)}
        yield from ((prefix + key, found[key]) for key in _MEANING if found.get(key) is not None)


def _rope(part: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of rotary positions: transformers 5 writes them in one mapping, older ones in two places."""
    keys = ("rope_parameters", "rope_scaling")
    if not any(key in part for key in keys):
        return {}
    rope: Mapping[str, Any] = next((part[key] for key in keys if isinstance(part.get(key), dict)), {})
    return {
        "rope_theta": rope.get("rope_theta", part.get("rope_theta")),
        "rope_type": rope.get("rope_type", rope.get("type", "default")),
        "rope_factor": rope.get("factor", 1.0),
    }


def _count(value: object) -> int:
    """Return a count of a config; 0 for anything else."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


def _shown(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
