"""Small LoRA adapters on disk for the tests, written without the code under test."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

SHAPES = {"layers.0.q": (24, 16), "layers.0.up": (40, 16), "layers.1.q": (24, 16)}


def factors(shape, rank, seed, dtype=torch.float32):
    """Random A (r, in) and B (out, r)."""
    generator = torch.Generator().manual_seed(seed)
    A, B = torch.randn(rank, shape[1], generator=generator), torch.randn(shape[0], rank, generator=generator)
    return A.to(dtype), B.to(dtype)


def save_adapter(folder: Path, modules, tensors=None, **config) -> Path:
    """Write an adapter of ``{module: (A, B)}``; embeddings are modules that end in ``embed``."""
    stored = dict(tensors or {})
    for module, (A, B) in modules.items():
        names = ("lora_embedding_A", "lora_embedding_B") if module.endswith("embed") else None
        for name, factor in zip(names or ("lora_A.weight", "lora_B.weight"), (A, B), strict=True):
            stored[f"base_model.model.{module}.{name}"] = factor.clone()
    folder.mkdir(parents=True)
    save_file(stored, folder / "adapter_model.safetensors")
    rank = max((len(A) for A, _ in modules.values()), default=8)
    settings = {
        "peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": list(modules), "bias": "none",
        "rank_pattern": {module: len(A) for module, (A, _) in modules.items() if len(A) != rank},
        "base_model_name_or_path": "some/base", "task_type": "CAUSAL_LM", "modules_to_save": None,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(settings | config))
    return folder


def random_adapter(folder: Path, seed, rank=4, dtype=torch.float32, shapes=None, **config) -> Path:
    """Write an adapter with random factors."""
    shapes = shapes or SHAPES
    return save_adapter(folder, {m: factors(s, rank, 10 * seed + i, dtype) for i, (m, s) in enumerate(shapes.items())},
                        **config)  # fmt: skip


def dense_updates(folder: Path):
    """The updates of an adapter with patterns named in full, ``{module: scale * B @ A}`` in float64."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    updates = {}
    for name, A in tensors.items():
        if "lora_A" not in name and "lora_embedding_A" not in name:
            continue
        B = tensors[name.replace("lora_A", "lora_B").replace("lora_embedding_A", "lora_embedding_B")]
        module = name.removeprefix("base_model.model.").partition(".lora_")[0]
        rank = config["rank_pattern"].get(module, config["r"])
        assert A.shape[0] == B.shape[1] == rank
        alpha = config.get("alpha_pattern", {}).get(module, config["lora_alpha"])
        updates[module] = alpha / (rank**0.5 if config.get("use_rslora") else rank) * B.double() @ A.double()
    return updates
