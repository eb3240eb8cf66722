"""Write tiny language models to try merges on: a base and fine-tunes, in folders as Hugging Face has them.

    python examples/small_models.py BASE TUNE [TUNE ...]

The weights are random: the merges work, the models say nothing.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

LAYERS, WIDTH, HIDDEN, VOCABULARY = 2, 64, 176, 512
CONFIG = {
    "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_size": WIDTH, "intermediate_size": HIDDEN,
    "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": VOCABULARY,
    "max_position_embeddings": 128, "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip


def shapes() -> dict[str, tuple[int, ...]]:
    """Return the shape of every weight, by its name."""
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY, WIDTH),
        "model.norm.weight": (WIDTH,),
    }
    for layer in (f"model.layers.{number}" for number in range(LAYERS)):
        found |= {f"{layer}.self_attn.{name}_proj.weight": (WIDTH, WIDTH) for name in "qkvo"}
        found |= {f"{layer}.mlp.{name}_proj.weight": (HIDDEN, WIDTH) for name in ("gate", "up")}
        found |= {f"{layer}.mlp.down_proj.weight": (WIDTH, HIDDEN)}
        found |= {f"{layer}.{name}_layernorm.weight": (WIDTH,) for name in ("input", "post_attention")}
    return found | {"lm_head.weight": (VOCABULARY, WIDTH)}


def main(folders: list[str]) -> None:
    """Write the base into the first folder, and a fine-tune of it into each of the others."""
    if len(folders) < 2:
        sys.exit(__doc__)
    random = torch.Generator().manual_seed(0)
    base = {name: 0.02 * torch.randn(shape, generator=random) for name, shape in shapes().items()}
    for index, folder in enumerate(map(Path, folders)):
        weights = base
        if index:
            weights = {name: value + 0.002 * torch.randn(value.shape, generator=random) for name, value in base.items()}
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n", encoding="utf-8")
        stored = {name: value.bfloat16() for name, value in weights.items()}
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    main(sys.argv[1:])
