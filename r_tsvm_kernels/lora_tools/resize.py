"""Cut an adapter to a smaller rank."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..config import as_dtype
from ..engine import Progress, choose_device
from ..errors import ConfigError
from ..linalg import Factored
from ..lora import Adapter, rank_of, truncated
from ..text import dtype_name
from .output import AdapterResult, ModuleReport, adapter_output, finish, finish_like


def resize_lora(
    adapter: str | Path,
    out: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    out_dtype: torch.dtype | str = "float32",
    device: str = "auto",
    progress: Callable[[Progress], None] | None = None,
) -> AdapterResult:
    """Cut an adapter to a smaller rank: the best approximation of every update, by QR and a small SVD.

    Args:
        adapter: folder or Hugging Face id.
        out: a folder that does not exist yet or is empty.
        rank: largest rank; None means no limit.
        energy: per module, take the smallest rank that retains this share of the update's squared Frobenius norm.
        out_dtype: dtype of the factors, a `torch.dtype` or its name.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:1``.
        progress: called after each module.

    Raises:
        ConfigError, DeviceError, CheckpointError, NonFiniteError, ConvergenceError, DiskFullError: as `merge_lora`.
    """
    start, target, dtype = time.perf_counter(), choose_device(device), as_dtype(out_dtype)
    if rank is None and energy is None:
        raise ConfigError(
            "expected a rank or a share of the energy, got neither; give --rank (rank=) or --energy (energy=)"
        )
    rank_of((1, 1), rank, energy)
    source = Adapter(str(adapter))
    with adapter_output(out, dtype, bytes_per_module([source]), progress) as output:
        for name, module in source.modules.items():
            update, report = cut(source.load(name, target), rank, energy)
            output.writer.add(name, update, embedding=module.embedding)
            output.modules[name] = report
            output.done(name)
        finish_like(output, [source])
        request = {"adapter": str(adapter), "rank": rank, "energy": energy, "out_dtype": dtype_name(dtype)}
        return finish(output, Path(out), "resize-lora", request, start)


def cut(matrix: Factored, rank: int | None, energy: float | None, **facts: Any) -> tuple[Factored, ModuleReport]:
    """Cut an update to its rank. Returns the update and its report, with `facts` as further fields."""
    update, captured = truncated(matrix, rank_of(matrix.shape, rank, energy))
    singular_values = update.left.square().sum(0)  # each factor has their square roots
    norm = float(torch.linalg.vector_norm(singular_values)) / math.sqrt(captured) if captured else 0.0
    return update, ModuleReport(matrix.shape, update.left.shape[1], norm, captured, **facts)


def bytes_per_module(sources: Sequence[Adapter]) -> dict[str, int]:
    """Return the bytes to read per module."""
    sizes: dict[str, int] = {}
    for source in sources:
        for name, module in source.modules.items():
            sizes[name] = sizes.get(name, 0) + module.nbytes
    return sizes
