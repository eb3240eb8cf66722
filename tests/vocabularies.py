"""Small models whose tokenizers differ: the same tokens with other ids, added tokens, padding."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

WIDTH = 4
EMBEDDING, HEAD, BIAS, LAYER = (
    "model.embed_tokens.weight", "lm_head.weight", "lm_head.bias", "model.layers.0.mlp.weight",
)  # fmt: skip
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
PIECES = list("abcdefgh")


def tokenizer_json(pieces, added=(), kind="BPE", merges=()):
    """The content of a tokenizer.json: pieces in the order of their ids, and tokens after them."""
    vocabulary = [[piece, -1.0] for piece in pieces] if kind == "Unigram" else {p: i for i, p in enumerate(pieces)}
    entries = [{"id": len(pieces) + i, "content": token, **FLAGS} for i, token in enumerate(added)]
    model = {"type": kind, "vocab": vocabulary} | ({"merges": list(merges)} if kind == "BPE" else {})
    return {"version": "1.0", "added_tokens": entries, "model": model}


def tensors_of(height, seed, dtype=torch.float32, tied=False):
    """Random tensors: embedding, head with a bias, one matrix of a layer, a norm of the embedding's width."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {EMBEDDING: (height, WIDTH), LAYER: (6, WIDTH), "model.norm.weight": (WIDTH,)}
    shapes |= {} if tied else {HEAD: (height, WIDTH), BIAS: (height,)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def write(folder: Path, tensors, tokenizer, config=None, **files) -> str:
    """Write a model; `files` are JSON files by name without suffix."""
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    height = tensors[EMBEDDING].shape[0]
    contents = {"config": {"model_type": "llama", "vocab_size": height} | (config or {})} | files
    for name, content in (contents | ({"tokenizer": tokenizer} if tokenizer else {})).items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return str(folder)


def ids_of(tokenizer):
    """Id by token."""
    vocabulary = tokenizer["model"]["vocab"]
    ids = vocabulary if isinstance(vocabulary, dict) else {item[0]: i for i, item in enumerate(vocabulary)}
    return ids | {entry["content"]: entry["id"] for entry in tokenizer["added_tokens"]}
