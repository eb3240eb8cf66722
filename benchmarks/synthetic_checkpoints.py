"""Synthetic checkpoints of a given size: Llama's shapes and names, in shards of about 1 GB."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from r_tsvm_kernels.bench import MODELS

SEED = 0
SHARD_BYTES = 1e9


@dataclass(frozen=True)
class Family:
    """A base and its fine-tunes on disk."""

    base: Path
    tuned: list[Path]
    checkpoint_bytes: int
    largest_group_bytes: int

    @property
    def files(self) -> list[Path]:
        """The shards of all models."""
        return [file for model in (self.base, *self.tuned) for file in sorted(model.glob("*.safetensors"))]

    def write_recipe(self, method: str) -> Path:
        """Write a recipe that mergekit reads, too; return its path.

        An average is one of all models, the base included; everything else adds half of each fine-tune's task vector.
        """
        averaged = [self.base, *self.tuned] if method == "linear" else self.tuned
        recipe = {
            "merge_method": method,
            "models": [{"model": str(model), "parameters": {"weight": 0.5}} for model in averaged],
            "dtype": "bfloat16",
        }
        if method != "linear":
            recipe["base_model"] = str(self.base)
        file = self.base.parent / f"{method}.yaml"
        file.write_text(json.dumps(recipe))  # JSON is YAML
        return file


def merge_command(recipe: Path, out: Path, threads: int | None = None) -> list[str]:
    """Return the command that merges on this machine's CPU and prints errors only."""
    limit = [] if threads is None else ["--threads", str(threads)]
    return [sys.executable, "-m", "r_tsvm_kernels", "merge", str(recipe), str(out), "--device=cpu", "--quiet", *limit]


@contextmanager
def family(folder: Path, gigabytes: float, tasks: int, hidden: int) -> Iterator[Family]:
    """Write a base and `tasks` fine-tunes, each of about so many GB in bfloat16; delete them afterwards."""
    shapes = part_shapes(hidden)
    with family_of_shapes(folder, shapes, layer_count(gigabytes, hidden), tasks) as models:
        yield models


@contextmanager
def family_of_shapes(
    folder: Path, shapes: dict[str, tuple[int, ...]], layers: int, tasks: int, outputs: int = 2
) -> Iterator[Family]:
    """Write a base and `tasks` fine-tunes of so many layers in bfloat16; delete them afterwards.

    There must be room for them and for `outputs` merged models.

    Every layer holds the same values. A merge that streams cannot tell, and the checkpoints are written as fast as the
    disk allows.
    """
    need = (tasks + 1 + outputs) * checkpoint_bytes(shapes, layers)
    free = shutil.disk_usage(folder).free
    if free < 1.1 * need:
        raise SystemExit(f"{folder}: {need / 1e9:.1f} GB and a reserve are needed, {free / 1e9:.1f} GB are free")
    with tempfile.TemporaryDirectory(prefix="rtsvm-models-", dir=folder) as name:
        top = Path(name)
        torch.manual_seed(SEED)
        base = {part: (0.02 * torch.randn(shape)).bfloat16() for part, shape in shapes.items()}
        _write(top / "base", base, layers)
        tuned = []
        for task in range(tasks):
            values = {part: (t.float() + 1e-3 * torch.randn(t.shape)).bfloat16() for part, t in base.items()}
            tuned.append(_write(top / f"tuned-{task}", values, layers))
        size = sum(file.stat().st_size for file in (top / "base").glob("*.safetensors"))
        yield Family(top / "base", tuned, size, (tasks + 1) * max(t.nbytes for t in base.values()))


def part_shapes(hidden: int) -> dict[str, tuple[int, ...]]:
    """Embedding and norm of the model, and the tensors of one layer."""
    inner = hidden * 11 // 4
    layer = {f"self_attn.{side}_proj.weight": (hidden, hidden) for side in "qkvo"}
    layer |= {"mlp.gate_proj.weight": (inner, hidden), "mlp.up_proj.weight": (inner, hidden)}
    layer |= {"mlp.down_proj.weight": (hidden, inner)}
    layer |= {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}
    return {"embed_tokens.weight": (16 * hidden, hidden), "norm.weight": (hidden,)} | layer


def mistral_shapes(shrink: int = 1) -> dict[str, tuple[int, ...]]:
    """Embedding, norm and head of Mistral-7B, and the tensors of one of its layers; `shrink` divides all sizes."""
    hidden, vocabulary = 4096 // shrink, 32000 // shrink
    layer: dict[str, tuple[int, ...]] = {}
    for name, (rows, columns) in MODELS["Mistral-7B"].matrices.items():
        block = "self_attn" if name[0] in "qkvo" else "mlp"
        layer[f"{block}.{name}.weight"] = (rows // shrink, columns // shrink)
    layer |= {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}
    table = (vocabulary, hidden)
    return {"embed_tokens.weight": table, "norm.weight": (hidden,), "lm_head.weight": table} | layer


def checkpoint_bytes(shapes: dict[str, tuple[int, ...]], layers: int) -> int:
    """Size of a checkpoint in bfloat16."""
    return sum(2 * torch.Size(shape).numel() * (layers if _in_layer(part) else 1) for part, shape in shapes.items())


def _in_layer(part: str) -> bool:
    return "layernorm" in part or "proj" in part


def layer_count(gigabytes: float, hidden: int) -> int:
    sizes = {part: 2 * torch.Size(shape).numel() for part, shape in part_shapes(hidden).items()}
    embedding = sizes.pop("embed_tokens.weight")
    layers = round((gigabytes * 1e9 - embedding) / sum(sizes.values()))
    if layers < 1:
        raise SystemExit(f"{gigabytes} GB do not hold one layer of width {hidden}: choose a smaller --hidden")
    return layers


def evict(files: list[Path]) -> None:
    """Write files back and drop them from the page cache, so that the next reader finds them on disk alone."""
    for file in files:
        fd = os.open(file, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def warm(files: list[Path]) -> None:
    """Bring files into the page cache."""
    for file in files:
        with file.open("rb", buffering=0) as stream:
            while stream.read(1 << 24):
                pass


def _write(folder: Path, parts: dict[str, Tensor], layers: int) -> Path:
    folder.mkdir()
    in_layer = [part for part in parts if _in_layer(part)]
    names = {("" if part.startswith("lm_head") else "model.") + part: part for part in parts if not _in_layer(part)}
    names |= {f"model.layers.{layer}.{part}": part for layer in range(layers) for part in in_layer}
    shards: list[dict[str, str]] = [{}]
    filled = 0
    for name, part in names.items():
        if filled + parts[part].nbytes > SHARD_BYTES:
            shards.append({})
            filled = 0
        shards[-1][name] = part
        filled += parts[part].nbytes
    weight_map = {}
    for index, shard in enumerate(shards):
        file = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        # The format does not allow two names for one memory.
        save_file({name: parts[part].clone() for name, part in shard.items()}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(_config(layers, parts)))
    return folder


def _config(layers: int, parts: dict[str, Tensor]) -> dict[str, object]:
    vocabulary, hidden = parts["embed_tokens.weight"].shape
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": len(parts["mlp.gate_proj.weight"]),
        "num_attention_heads": 8,
        "num_key_value_heads": 8 * len(parts["self_attn.k_proj.weight"]) // hidden or 1,
        "num_hidden_layers": layers,
        "vocab_size": vocabulary,
        "tie_word_embeddings": "lm_head.weight" not in parts,
        "torch_dtype": "bfloat16",
    }
