"""Small checkpoints on disk for the tests."""

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

SHAPES = {
    "model.embed_tokens.weight": (50, 16),
    "model.layers.0.attn.weight": (16, 16),
    "model.layers.0.mlp.weight": (32, 16),
    "model.layers.1.attn.weight": (16, 16),
    "model.layers.1.mlp.weight": (32, 16),
    "model.norm.weight": (16,),
    "scale": (),
}


def state_dict(seed, dtype=torch.float32):
    """Random floating tensors, one integer and one bool buffer, one empty tensor."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}
    return tensors | {
        "position_ids": torch.arange(7) + seed,
        "mask": torch.tensor([True, False]),
        "nothing": torch.empty(0, 4, dtype=dtype),
    }


def tuned_state_dict(base, seed):
    """The base with a little noise on every floating tensor; integers changed too."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (t.float() + 0.05 * torch.randn(t.shape, generator=generator)).to(t.dtype) if t.is_floating_point()
        else (t + seed if t.dtype == torch.int64 else t)
        for name, t in base.items()
    }  # fmt: skip


def save(folder: Path, tensors, shards=1, config=None, stem="model") -> Path:
    """Write a Hugging Face folder, in several shards if asked."""
    folder.mkdir(parents=True)
    names = list(tensors)
    if shards == 1:
        save_file(tensors, folder / f"{stem}.safetensors", metadata={"format": "pt"})
    else:
        weight_map = {}
        for i in range(shards):
            file = f"{stem}-{i + 1:05d}-of-{shards:05d}.safetensors"
            part = {name: tensors[name] for name in names[i::shards]}
            save_file(part, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(part, file)
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "toy", "torch_dtype": "float32"}))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def family(folder: Path, tasks=2, dtype=torch.float32, shards=(1, 2, 3), config=None):
    """Write base and fine-tunes, sharded differently; return their paths and state dicts."""
    base = state_dict(0, dtype)
    tuned = [tuned_state_dict(base, seed + 1) for seed in range(tasks)]
    paths = [
        save(folder / name, tensors, shards[i % len(shards)], config)
        for i, (name, tensors) in enumerate([("base", base), *((f"expert{t}", sd) for t, sd in enumerate(tuned))])
    ]
    return paths, base, tuned


def digest(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def without_times(report):
    """A merge's report without the values that differ from run to run; asserts that they are there."""
    for key in ("date", "seconds", "resumed_tensors", "threads", "engine", "stages"):
        del report[key]
    for entry in report["tensors"].values():
        del entry["seconds"], entry["stages"]
    return report
