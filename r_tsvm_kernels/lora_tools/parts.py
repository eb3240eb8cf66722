"""Write the parts of every task as a LoRA adapter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from ..engine import Progress
from ..errors import ConfigError
from ..parts_folder import PartsFolder
from .extract import extract_lora
from .output import AdapterResult


def parts_to_lora(
    parts: str | Path,
    out: str | Path,
    *,
    base: str | Path | None = None,
    rank: int | None = None,
    energy: float | None = None,
    embed_lora: bool = False,
    out_dtype: torch.dtype | str = "float32",
    device: str = "auto",
    progress: Callable[[Progress], None] | None = None,
) -> dict[str, AdapterResult]:
    """Write the parts of every task as a LoRA adapter that PEFT loads, one folder for each.

    Adapters of plain fine-tunes collide when their sum is used. These are the summands of a merge: with weight 1 each,
    their sum is the merged model, apart from what an adapter cannot express (norms, biases), which the reports list.

    Args:
        parts: the folder that `decompose_checkpoints` wrote.
        out: folder of the adapters ``OUT/TASK``, which must not exist yet.
        base: the base; None means the one of the recipe.
        rank: largest rank; None keeps the rank of each part.
        energy: per matrix the smallest rank that holds this share of the part's squared Frobenius norm.
        embed_lora: as for `extract_lora`.
        out_dtype: as for `extract_lora`.
        device: as for `extract_lora`.
        progress: as for `extract_lora`.

    Returns:
        The result of `extract_lora` for each task, by its name.

    Raises:
        CheckpointError, ConfigError, OutputExistsError: as `extract_lora`.

    Examples:
        >>> from safetensors.torch import save_file
        >>> from r_tsvm_kernels import MergeConfig, decompose_checkpoints
        >>> for seed, name in enumerate(("base", "math", "code")):
        ...     generator = torch.Generator().manual_seed(seed)
        ...     save_file({"up.weight": torch.randn(12, 8, generator=generator)}, f"{name}.safetensors")
        >>> recipe = MergeConfig("tsvm", base_model="base.safetensors", models=["math.safetensors", "code.safetensors"])
        >>> result = decompose_checkpoints(recipe, "parts_for_lora")
        >>> {task: made.modules["up"].rank for task, made in parts_to_lora("parts_for_lora", "adapters").items()}
        {'math': 4, 'code': 4}
    """
    folder = PartsFolder.open(parts)
    base = folder.recipe.get("base_model") if base is None else base
    if base is None:
        raise ConfigError(f"{parts}: its recipe names no base; give base")
    return {
        task.name: extract_lora(
            base,
            folder.path / task.file,
            Path(out) / task.name,
            rank=rank,
            energy=energy,
            embed_lora=embed_lora,
            out_dtype=out_dtype,
            device=device,
            progress=progress,
        )
        for task in folder.tasks
    }
