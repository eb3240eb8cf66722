"""Shapes of the matrices of public models, as in their published configurations."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Model:
    """The matrices of one block of a model.

    Attributes:
        name: as the model is called.
        blocks: how many such blocks it has.
        matrices: (rows, columns) by the name of the matrix, as torch stores it: (outputs, inputs).
    """

    name: str
    blocks: int
    matrices: dict[str, tuple[int, int]]


def _llama(name: str, blocks: int, hidden: int, inner: int, key_value: int) -> Model:
    return Model(
        name,
        blocks,
        {
            "q_proj": (hidden, hidden),
            "k_proj": (key_value, hidden),
            "v_proj": (key_value, hidden),
            "o_proj": (hidden, hidden),
            "gate_proj": (inner, hidden),
            "up_proj": (inner, hidden),
            "down_proj": (hidden, inner),
        },
    )


def _transformer_block(name: str, blocks: int, width: int, context: int) -> Model:
    return Model(
        name,
        blocks,
        {
            "self_attn": (width, width),
            "cross_attn_kv": (width, context),
            "ff_geglu": (8 * width, width),
            "ff_out": (width, 4 * width),
        },
    )


MODELS = {
    model.name: model
    for model in (
        _llama("Mistral-7B", 32, 4096, 14336, 1024),
        _llama("Llama-3-8B", 32, 4096, 14336, 1024),
        _llama("Qwen2.5-7B", 28, 3584, 18944, 512),
        Model("ViT-B/32", 12, {"attention": (768, 768), "mlp_in": (3072, 768), "mlp_out": (768, 3072)}),
        _transformer_block("SDXL 640", 10, 640, 2048),
        _transformer_block("SDXL 1280", 60, 1280, 2048),
    )
}


def matrix(label: str) -> tuple[int, int]:
    """Return the shape of a matrix by its label, e.g. ``Mistral-7B q_proj``."""
    model, _, name = label.rpartition(" ")
    return MODELS[model].matrices[name]
