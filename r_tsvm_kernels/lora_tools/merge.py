"""Merge adapters of one base into one adapter."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, get_args

import torch

from ..config import as_dtype
from ..engine import Progress, choose_device
from ..errors import ConfigError
from ..linalg import fixed_rank, merge_factored, weighted_sum
from ..lora import Adapter, common_modules, rank_of
from ..ops._checks import numbers_of
from ..ops.elect_and_sum import normalized
from ..text import dtype_name
from .output import AdapterResult, adapter_output, finish, finish_like
from .resize import bytes_per_module, cut

AdapterMethod = Literal["tsvm", "linear", "task_arithmetic"]


def merge_lora(
    adapters: Sequence[str | Path],
    out: str | Path,
    *,
    method: AdapterMethod = "tsvm",
    weight: Sequence[float] | float = 1.0,
    rank: int | None = None,
    energy: float | None = None,
    out_dtype: torch.dtype | str = "float32",
    device: str = "auto",
    progress: Callable[[Progress], None] | None = None,
) -> AdapterResult:
    """Merge adapters of one base into one adapter, without ever forming a dense update.

    A module that an adapter lacks counts as an update of zero.

    Args:
        adapters: folders or Hugging Face ids.
        out: a folder that does not exist yet or is empty.
        method: ``tsvm`` (TSV-Merge of the updates), ``linear`` (weighted average: the weights are divided by their
            sum) or ``task_arithmetic`` (weighted sum).
        weight: one number per adapter, or one for all.
        rank: largest rank of the merged updates; None keeps them exactly, at most at the sum of the ranks.
        energy: per module, take the smallest rank that retains this share of the merged update's squared Frobenius
            norm.
        out_dtype: dtype of the factors, a `torch.dtype` or its name.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:1``.
        progress: called after each module.

    Raises:
        ConfigError, DeviceError, OutputExistsError, OutputBusyError, OutputUnfinishedError: the request cannot be
            carried out.
        AdapterRefusedError, PickleRefusedError, CheckpointError: an adapter is damaged or of a kind that is not
            supported.
        ShapeError: the adapters do not belong to one base.
        NonFiniteError, ConvergenceError: the values cannot be merged.
        DiskFullError: there is no space for the output.
    """
    start, target, dtype = time.perf_counter(), choose_device(device), as_dtype(out_dtype)
    if isinstance(adapters, str | Path):
        raise ConfigError(f"adapters: expected a list of folders or ids, got {str(adapters)!r}; put it in a list")
    factors = numbers_of(weight, len(adapters), "merge_lora: weight")
    if method not in get_args(AdapterMethod):
        raise ConfigError(f"method must be one of {', '.join(get_args(AdapterMethod))}, got {method!r}")
    if not adapters:
        raise ConfigError("no adapters; give at least one")
    rank_of((1, 1), rank, energy)
    if method == "linear":
        factors = normalized(factors, "use the method task_arithmetic")
    sources = [Adapter(str(adapter)) for adapter in adapters]
    names = common_modules(sources)
    with adapter_output(out, dtype, bytes_per_module(sources), progress) as output:
        for name in names:
            own = [(source, weight) for source, weight in zip(sources, factors, strict=True) if name in source.modules]
            matrices, shares = [source.load(name, target) for source, _ in own], [weight for _, weight in own]
            if method == "tsvm":
                limit = fixed_rank(matrices[0].shape, len(matrices))
                merged = merge_factored(matrices, [limit] * len(matrices), shares)
                facts = {"certificate": merged.certificate, "ranks": merged.ranks, "energies": merged.captured_energy}
                update, report = cut(merged.update, rank, energy, **facts)
            else:
                update, report = cut(weighted_sum(matrices, shares), rank, energy)
            output.writer.add(name, update, embedding=own[0][0].modules[name].embedding)
            output.modules[name] = report
            output.done(name)
        finish_like(output, sources)
        request = {"adapters": list(map(str, adapters)), "method": method, "weight": factors, "rank": rank,
                   "energy": energy, "out_dtype": dtype_name(dtype)}  # fmt: skip
        return finish(output, Path(out), "merge-lora", request, start)
